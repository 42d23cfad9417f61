"""In which types an engine computes the products of its graph: read from the builder's own description of the engine.

The engine inspector needs a driver. But where a build keeps the details, TensorRT's verbose log ends with the same
lines, one a layer (seen with TensorRT-RTX 1.7.1):

    Name: ..., LayerType: gemm, Inputs: [ { .., Datatype: Int8, .. }], Constants: [ { .. }], Outputs: [ .. ], ..,
        Metadata: [ONNX Layer: layers.1.node_matmul_2][ONNX Layer: ..]

A layer that several nodes were fused into names them all.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# Layers that are products. (Others that name a MatMul do what is left to do behind it, scaling for one.)
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?:gemm|runtime_fusion), "
    r"Inputs: (?P<operands>.*?), Outputs: (?P<results>.*?), Tactic.*?, Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
# A fused layer's name tells its steps in order, Fc being the product. Codes that are cast before it are no operands.
_CAST_FIRST = re.compile(r"__myl_\w*Cast\w*Fc")
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# TensorRT's names of types and ONNX's, from narrow to wide.
_NAMES = {"Int8": "int8", "FP8": "float8", "BFloat16": "bfloat16", "Half": "float16", "Float": "float"}
_WIDTHS = list(_NAMES.values())
EIGHT_BITS = ("int8", "float8")
UNKNOWN = "unknown"


def is_information(text: str) -> bool:
    """Whether a message of the builder's describes layers."""
    return ", LayerType: " in text


def product_types(information: str, names: Collection[str]) -> dict[str, str]:
    """The type that each product of a graph is computed in: 8 bits where both operands are, else that of its rows.

    Args:
        information: what the builder said of the layers.
        names: of the products' nodes.
    Returns: node -> type as ONNX writes it; of a node that stands in several layers (a profile each) the widest;
        `UNKNOWN` where no layer names it.
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
