"""Fewer nodes: what a single step need not run, or need not run apart.

Rewrites that know nothing of skipping. Each says how many places it changed. What they are worth is in
benchmarks/RESULTS.md: a node of a few numbers costs a step about two microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gsx_engines.lowering.nodes import replace_nodes

# Ops that leave the axes of their first input alone, so that states may have one more in front.
_ROW_BY_ROW = frozenset(
    (
        "Add",
        "Cast",
        "DequantizeLinear",
        "Identity",
        "MatMul",
        "MatMulIntegerToFloat",
        "Mul",
        "QuantizeLinear",
        "RMSNormalization",
        "Sigmoid",
    )
)
# Where a node's results are read: by a node of the graph, or inside one branch of an `If`.
_Reader = tuple[int, str]


def sink(graph: onnx.GraphProto) -> int:
    """What one branch of one `If` alone reads moves into it, in place. Returns: how many nodes moved."""
    readers: dict[str, set[_Reader]] = {}

    def note(names: Iterable[str], reader: _Reader) -> None:
        for name in names:
            readers.setdefault(name, set()).add(reader)

    for value in graph.output:
        note([value.name], (-1, ""))
    inside: dict[_Reader, list[int]] = {}
    nodes = list(graph.node)
    for number in reversed(range(len(nodes))):
        node = nodes[number]
        found = set().union(*(readers.get(name, set()) for name in node.output))
        reader = next(iter(found)) if len(found) == 1 else (-1, "")
        if reader[1]:
            inside.setdefault(reader, []).append(number)
            note((*node.input, *_read_inside(node)), reader)
            continue
        note(node.input, (number, ""))
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                note(_outer_names(attribute.g), (number, attribute.name))
    moved = {number for members in inside.values() for number in members}
    for (number, side), members in sorted(inside.items()):  # an `If` that moves comes before the one it moves into
        branch = next(attribute.g for attribute in nodes[number].attribute if attribute.name == side)
        replace_nodes(branch, [*(nodes[member] for member in sorted(members)), *branch.node])
    replace_nodes(graph, [node for number, node in enumerate(nodes) if number not in moved])
    return len(moved)


def _read_inside(node: onnx.NodeProto) -> set[str]:
    graphs = (attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)
    return set().union(*(_outer_names(graph) for graph in graphs))


def _outer_names(graph: onnx.GraphProto) -> set[str]:
    """What a branch reads from outside."""
    made = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in (*node.input, *_read_inside(node)) if name}
    return read - made


def add_rows(graph: onnx.GraphProto) -> int:
    """GatedScatterAdd, here and in branches, in place: one ScatterND that adds, and no product with a gate of ones.

    Returns: how many.
    """
    ones = {tensor.name for tensor in graph.initializer if _is(tensor, 1.0)}
    expanded = {n.output[0] for n in _every_node(graph) if n.op_type == "Expand" and n.input[0] in ones}
    last = "lowered.last_axis"
    count = 0

    def spelled(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        residual, rows, gate, index = node.input
        out, place = node.output[0], f"{node.output[0]}.place"
        nodes = [helper.make_node("Unsqueeze", [index, last], [place], name=place)]
        if gate not in expanded:
            gated = f"{out}.gated"
            nodes.append(helper.make_node("Mul", [gate, rows], [gated], name=gated))
            rows = gated
        return [*nodes, helper.make_node("ScatterND", [residual, place, rows], [out], name=out, reduction="add")]

    for part in _every_graph(graph):
        nodes: list[onnx.NodeProto] = []
        for node in part.node:
            if node.op_type == "GatedScatterAdd":
                nodes += spelled(node)
                count += 1
            else:
                nodes.append(node)
        replace_nodes(part, nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), last))
    return count


def spread_columns(graph: onnx.GraphProto) -> int:
    """A product with one column, [.., H] x [H, 1], gets a matrix of three axes, in place. Returns: how many.

    ONNX Runtime packs constant matrices of two axes into panels of 16 columns, and then computes 16: a gate's score of
    512 tokens took 790 microseconds, and 25 as it is written here.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    column = "lowered.column"
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        nodes.append(node)
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or list(weight.dims[1:]) != [1]:
            continue
        weight.dims.insert(0, 1)
        out, apart = node.output[0], f"{node.output[0]}.apart"
        node.output[0] = apart
        nodes.append(helper.make_node("Reshape", [apart, column], [out], name=out))
        count += 1
    replace_nodes(graph, nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 1]), column))
    return count


def keep_sequence_axis(graph: onnx.GraphProto, first: str, last: str) -> int:
    """States of one sequence keep its axis, [1, N, H] in place of [N, H], in place: attention need not put it on.

    Args:
        first: the state that enters the layers, [N, H].
        last: the one that leaves them, which is shaped [1, S, H] behind them.
    Returns: how many nodes went; 0 where some node would have to know (norms of heads).
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    start = next((number for number, node in enumerate(graph.node) if first in node.input), 0)
    lifted, attended = {first}, set[str]()
    aliases: dict[str, str] = {}
    for node in graph.node[start:]:
        inputs = [aliases.get(name, name) for name in node.input]
        touched = lifted.intersection(inputs)
        if node.op_type == "GroupQueryAttention":
            attended.add(node.output[0])
        elif node.op_type == "Reshape" and (inputs[0] in attended or node.input[0] == last):
            aliases[node.output[0]] = inputs[0]
            lifted.add(inputs[0])
        elif not touched:
            continue
        elif node.op_type == "Unsqueeze" and _is(constants.get(node.input[1]), 0):
            aliases[node.output[0]] = inputs[0]
        elif node.op_type in _ROW_BY_ROW:
            lifted.update(node.output)
        elif node.op_type != "RotaryEmbedding":
            return 0
    entering = f"{first}.of_sequence"
    axis = "lowered.sequence_axis"
    graph.initializer.append(numpy_helper.from_array(np.array([0]), axis))
    nodes = []
    for number, node in enumerate(graph.node):
        if number == start:
            nodes.append(helper.make_node("Unsqueeze", [first, axis], [entering], name=entering))
        if node.output[0] in aliases:
            continue
        if number >= start:
            named = [aliases.get(name, name) for name in node.input]
            node.input[:] = [entering if name == first else name for name in named]
        nodes.append(node)
    replace_nodes(graph, nodes)
    return len(aliases)


def drop_flat_reshapes(graph: onnx.GraphProto, flat: Iterable[str]) -> int:
    """Reshape([-1]) of what has one axis anyway goes, in branches too, in place. Returns: how many.

    Args: flat: names of such values.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    has_one = set(flat)
    aliases: dict[str, str] = {}
    for part in _every_graph(graph):
        nodes = []
        for node in part.node:
            if node.op_type == "Reshape" and node.input[0] in has_one and _is(constants.get(node.input[1]), -1):
                aliases[node.output[0]] = node.input[0]
            else:
                nodes.append(node)
        replace_nodes(part, nodes)
    for node in _every_node(graph):
        node.input[:] = [aliases.get(name, name) for name in node.input]
    return len(aliases)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Nodes and constants that nobody reads any more go, in branches too."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                drop_unread(attribute.g)
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            nodes.append(node)
            read.update((*node.input, *_read_inside(node)))
    replace_nodes(graph, reversed(nodes))
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _every_graph(graph: onnx.GraphProto) -> Iterable[onnx.GraphProto]:
    """A graph and the branches in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _every_graph(attribute.g)


def _every_node(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for part in _every_graph(graph):
        yield from part.node


def _is(tensor: onnx.TensorProto | None, number: float) -> bool:
    """Whether a constant is this one number."""
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or int(np.prod(tensor.dims)) != 1:
        return False
    return bool(numpy_helper.to_array(tensor).item() == number)
