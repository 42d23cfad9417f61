"""Adding to the residual stream and normalizing it, as one op."""

from __future__ import annotations

import onnx
from onnx import helper

from gsx_engines.lowering.for_onnxruntime.task import CONTRIB
from gsx_plugins.graph import Graph

_LAST_AXIS = -1


def add_and_normalize(graph: Graph) -> int:
    """Normalize a sum in the op that adds, here and in branches.

        x, y -> Add -> z; z -> RMSNormalization -> n      becomes
        x, y -> SkipSimplifiedLayerNormalization -> n, z

    Why: one node less in each half of a layer, and the sum is read while it is in the processor's cache. Sums with a
    constant (biases) stay. Returns: how many were replaced.
    """
    count = 0
    for part in graph.parts():
        norms: dict[str, onnx.NodeProto] = {}
        for node in part.nodes:
            if node.op_type == "RMSNormalization" and _normalizes_rows(node):
                norms.setdefault(node.input[0], node)
        sums = {
            node.output[0]: node
            for node in part.nodes
            if node.op_type == "Add" and node.output[0] in norms and not _adds_constant(graph, part, node)
        }
        fused = {id(norms[name]) for name in sums}

        def replaced(
            node: onnx.NodeProto,
            sums: dict[str, onnx.NodeProto] = sums,
            norms: dict[str, onnx.NodeProto] = norms,
            fused: set[int] = fused,
        ) -> list[onnx.NodeProto] | None:
            if id(node) in fused:
                return []
            if sums.get(node.output[0]) is not node:
                return None
            norm = norms[node.output[0]]
            epsilon = next((one.f for one in norm.attribute if one.name == "epsilon"), 1e-5)
            outputs = [norm.output[0], "", "", node.output[0]]
            inputs = [*node.input, norm.input[1]]
            kind = "SkipSimplifiedLayerNormalization"
            return [helper.make_node(kind, inputs, outputs, name=norm.name, domain=CONTRIB, epsilon=epsilon)]

        part.rewrite(replaced)
        count += len(sums)
    return count


def _normalizes_rows(node: onnx.NodeProto) -> bool:
    return next((one.i for one in node.attribute if one.name == "axis"), _LAST_AXIS) == _LAST_AXIS


def _adds_constant(graph: Graph, part: Graph, node: onnx.NodeProto) -> bool:
    return any(name in part.constants or name in graph.constants for name in node.input)
