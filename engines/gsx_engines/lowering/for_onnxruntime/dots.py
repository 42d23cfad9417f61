"""Dot products of rows, in few nodes."""

from __future__ import annotations

import onnx

from gsx_plugins.graph import Graph, make_node

_AXIS = "lowered.row"


def dot_rows(graph: Graph) -> int:
    """Compute dot products of rows as sums, here and in branches.

        x -> Unsqueeze(1), y -> Unsqueeze(2), both -> MatMul -> Squeeze(2) -> d      becomes
        x -> ReduceSumSquare -> d if x and y are the same;      x, y -> Mul -> ReduceSum -> d otherwise

    Why: two nodes, or one, instead of four. The portable graph has the product because ONNX Runtime's sums give a wrong
    shape for no rows, and a branch is only entered for some. Returns: how many.
    """
    count = 0
    for part in graph.parts():
        if part is not graph:
            count += part.rewrite(lambda node, part=part: _as_sum(graph, part, node))  # type: ignore[misc]
    if count:
        graph.add_constant(_AXIS, [1])
        graph.drop_unread()
    return count


def _as_sum(graph: Graph, part: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    if node.op_type != "Squeeze":
        return None
    product = part.producer(node.input[0])
    if product is None or product.op_type != "MatMul":
        return None
    sides = [part.producer(name) for name in product.input]
    lifted = [side for side in sides if side is not None and side.op_type == "Unsqueeze"]
    if [graph.number(side.input[1]) for side in lifted] != [1, 2] or graph.number(node.input[1]) != 2:
        return None
    one, other = (side.input[0] for side in lifted)
    out = node.output[0]
    if one == other:
        return [make_node("ReduceSumSquare", [one, _AXIS], out, keepdims=1)]
    return [
        make_node("Mul", [one, other], f"{out}.parts"),
        make_node("ReduceSum", [f"{out}.parts", _AXIS], out, keepdims=1),
    ]
