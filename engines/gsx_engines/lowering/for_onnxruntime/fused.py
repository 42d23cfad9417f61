"""Adding to the residual stream and normalizing it, as one op."""

from __future__ import annotations

import onnx
from onnx import helper

from gsx_engines.lowering.for_onnxruntime.task import CONTRIB
from gsx_plugins.graph import Graph, attribute

_LAST_AXIS, _EPSILON = -1, 1e-5  # RMSNormalization's defaults


def add_and_normalize(graph: Graph) -> int:
    """Normalize a sum in the op that adds, here and in branches.

        x, y -> Add -> z; z -> RMSNormalization -> n      becomes
        x, y -> SkipSimplifiedLayerNormalization -> n, z

    Why: one node less in each half of a layer, and the sum is read while it is in the processor's cache. Sums with a
    constant (biases) stay. Returns: how many were replaced.
    """
    return sum(_in_part(graph, part) for part in graph.parts())


def _in_part(graph: Graph, part: Graph) -> int:
    norms = {node.input[0]: node for node in reversed(part.nodes) if _normalizes_rows(node)}  # the first of each value
    count = 0
    for node in list(part.nodes):
        if node.op_type != "Add" or any(name in part.constants or name in graph.constants for name in node.input):
            continue
        norm = norms.get(node.output[0])
        if norm is not None:
            part.replace(norm)
            part.replace(node, _sum_and_norm(node, norm))
            count += 1
    return count


def _normalizes_rows(node: onnx.NodeProto) -> bool:
    return node.op_type == "RMSNormalization" and attribute(node, "axis", _LAST_AXIS) == _LAST_AXIS


def _sum_and_norm(add: onnx.NodeProto, norm: onnx.NodeProto) -> onnx.NodeProto:
    epsilon = next((one.f for one in norm.attribute if one.name == "epsilon"), _EPSILON)
    return helper.make_node(
        "SkipSimplifiedLayerNormalization",
        [*add.input, norm.input[1]],
        [norm.output[0], "", "", add.output[0]],
        name=norm.name,
        domain=CONTRIB,
        epsilon=epsilon,
    )
