"""Weights that several products of a graph read, as those of looped layers: stored once in an engine.

TensorRT makes one product of all products of one value (Q, K and V; gate and up projection), over a constant that it
puts together from their weights, and stores equal constants once. But what it puts together, and in which order,
depends on what surrounds the products, and that differs between visits of a layer: TensorRT-RTX 1.7.1 made `q, k, v` of
the first loop and `q, v, k` of later ones, and stored both. So the graph says what is put together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import ml_dtypes
import onnx
from onnx import helper

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, make_node


def join_shared_weights(graph: Graph, task: Task) -> int:
    """Make one product of products that read one value at every visit of their layer.

        x, W1 -> MatMul -> y1; x, W2 -> MatMul -> y2      becomes      x, Concat(W1, W2) -> MatMul -> Split -> y1, y2
        and if x has been read by other products          x is         Max(x, the lowest number) -> the same numbers

    Only for weights that several products read; TensorRT computes the Concat when it builds. Without the Max, which
    goes into the kernel that makes x, it would join further, where others read x at this visit only. Weights in 8 and 4
    bits stay as they are: TensorRT computes no codes when it builds. Returns: how many products went into others.
    """
    groups, instead, read = _groups(graph), dict[int, list[onnx.NodeProto]](), set[str]()
    for visits in groups:
        weights = [node.input[1] for node in visits[0]]
        joined = f"{weights[0]}.joined" if len(weights) > 1 else weights[0]
        widths = graph.add_constant(f"{weights[0]}.widths", [graph.constants[name].dims[1] for name in weights])
        if len(weights) > 1:
            graph.prepend(make_node("Concat", weights, joined, axis=1))
        for products in visits:
            value, nodes = products[0].input[0], list[onnx.NodeProto]()
            if value in read:
                value = f"{products[0].output[0]}.value"
                nodes.append(_unchanged(graph, products[0].input[0], weights[0], value))
            read.add(products[0].input[0])
            instead |= {id(node): [] for node in products}
            instead[_earliest(graph, products)] = [*nodes, *_joined(products, value, joined, widths)]
    graph.rewrite(lambda node: instead.get(id(node)))
    return len(instead) - sum(map(len, groups))


def _groups(graph: Graph) -> list[list[list[onnx.NodeProto]]]:
    """Products whose weights are read at several visits, always of one value: of each group the products by visit."""
    readers = {name: nodes for name in graph.constants if len(nodes := _products(graph, name)) > 1}
    together: dict[tuple[str, ...], list[list[onnx.NodeProto]]] = {}
    for nodes in readers.values():
        together.setdefault(tuple(node.input[0] for node in nodes), []).append(nodes)
    return [list(map(list, zip(*of_weights, strict=True))) for of_weights in together.values()]


def _products(graph: Graph, weight: str) -> list[onnx.NodeProto]:
    """The products that read a weight, in order; none if it is no matrix, or other nodes read it too."""
    users = list(graph.users(weight)) if len(graph.constants[weight].dims) == 2 else []
    return users if all(node.op_type == "MatMul" and node.input[1] == weight for node in users) else []


def _unchanged(graph: Graph, value: str, weight: str, out: str) -> onnx.NodeProto:
    """A node that gives a value of a weight's type as it is; TensorRT does not see that it does."""
    kind = helper.tensor_dtype_to_np_dtype(graph.constants[weight].data_type)
    lowest = graph.add_constant("lowered.lowest", ml_dtypes.finfo(kind).min)
    return make_node("Max", [value, lowest], out)


def _earliest(graph: Graph, nodes: Collection[onnx.NodeProto]) -> int:
    """The id of the first of some nodes."""
    wanted = {id(node) for node in nodes}
    return next(id(node) for node in graph.nodes if id(node) in wanted)


def _joined(products: Sequence[onnx.NodeProto], value: str, weight: str, widths: str) -> list[onnx.NodeProto]:
    """The product with joined weights, under the first one's name, and its parts."""
    first, ends = products[0], [node.output[0] for node in products]
    if len(ends) == 1:
        return [helper.make_node("MatMul", [value, weight], ends, name=first.name)]
    whole = f"{first.output[0]}.joined"
    return [
        helper.make_node("MatMul", [value, weight], [whole], name=first.name),
        helper.make_node("Split", [whole, widths], ends, name=f"{whole}.split", axis=-1),
    ]
