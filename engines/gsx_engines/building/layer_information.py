"""The types in which an engine computes the matrix products of its graph, from the builder's description of the engine.

The engine inspector needs a driver. But if a build keeps the details, TensorRT's verbose log ends with the same lines,
one for each layer (as of TensorRT-RTX 1.7.1):

    Name: ..., LayerType: gemm, Inputs: [ { .., Datatype: Int8, .. }], Constants: [ { .. }], Outputs: [ .. ], ..,
        Metadata: [ONNX Layer: layers.1.node_matmul_2][ONNX Layer: ..]

A layer that several nodes were fused into lists all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# Layers that are products. (Other layers that list a MatMul do what follows it, such as scaling.)
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?:gemm|runtime_fusion), "
    r"Inputs: (?P<operands>.*?), Outputs: (?P<results>.*?), Tactic.*?, Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
# The name of a fused layer lists its steps in order, with Fc for the product. Codes that are cast before it are not its
# operands.
_CAST_FIRST = re.compile(r"__myl_\w*Cast\w*Fc")
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# TensorRT's names of types -> those of ONNX, from narrow to wide.
_NAMES = {"Int8": "int8", "FP8": "float8", "BFloat16": "bfloat16", "Half": "float16", "Float": "float"}
_WIDTHS = list(_NAMES.values())
EIGHT_BITS = ("int8", "float8")
UNKNOWN = "unknown"


def is_information(text: str) -> bool:
    """Whether a message of the builder describes layers."""
    return ", LayerType: " in text


def product_types(information: str, names: Collection[str]) -> dict[str, str]:
    """The type in which each product of a graph is computed: 8 bits if both operands have 8, else the type of its rows.

    Args:
        information: the builder's messages about layers.
        names: of the products' nodes.
    Returns: node -> type in ONNX's spelling. For a node in several layers (one for each profile) it is the widest type;
        `UNKNOWN` if no layer lists the node.
    """
    found: dict[str, set[str]] = {name: set() for name in names}
    for layer in _LAYER.finditer(information):
        kind = _type_of(layer)
        for name in _NODE.findall(layer["nodes"]):
            if name in found:
                found[name].add(kind)
    return {name: max(types, key=_width, default=UNKNOWN) for name, types in found.items()}


def _type_of(layer: re.Match[str]) -> str:
    operands, results = (
        [_NAMES.get(kind, kind.lower()) for kind in _TYPE.findall(layer[part])] for part in ("operands", "results")
    )
    if not _CAST_FIRST.match(layer["name"]):
        for kind in EIGHT_BITS:
            if operands.count(kind) >= 2:
                return kind
    return next((kind for kind in [*operands, *results] if kind not in EIGHT_BITS), UNKNOWN)


def _width(kind: str) -> int:
    return _WIDTHS.index(kind) if kind in _WIDTHS else len(_WIDTHS)
