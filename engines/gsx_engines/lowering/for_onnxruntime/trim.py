"""Fewer nodes: removes or merges nodes that a single step does not need.

These rewrites do not depend on skipping. Each returns how many places it changed. Their effect is measured in
benchmarks/RESULTS.md: a node on a few numbers costs a step about two microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from gsx_engines.lowering.for_onnxruntime.task import Task
from gsx_plugins.graph import Graph, make_node

# Ops that keep the axes of their first input, so that states may have one more axis in front.
_ROW_BY_ROW = frozenset(
    (
        "Abs",
        "Add",
        "Cast",
        "DequantizeLinear",
        "Div",
        "Gelu",
        "Identity",
        "MatMul",
        "MatMulIntegerToFloat",
        "Mul",
        "QuantizeLinear",
        "RMSNormalization",
        "ReduceMax",  # of a row: its scale
        "Sigmoid",
    )
)
# Where a node's results are read: by a node of the graph, or inside one branch of an `If`.
_Reader = tuple[int, str]


def sink(graph: Graph) -> int:
    """Move nodes whose results are read only inside one branch of one `If` into that branch.

        x -> (node) -> y; If(then: y -> ..)      becomes      If(then: x -> (node) -> y -> ..)

    Why: they do not run if the branch is not entered. Returns: how many nodes moved.
    """
    readers: dict[str, set[_Reader]] = {}

    def note(names: Iterable[str], reader: _Reader) -> None:
        for name in names:
            readers.setdefault(name, set()).add(reader)

    note(graph.output_names, (-1, ""))
    inside: dict[_Reader, list[int]] = {}
    nodes = list(graph.nodes)
    for number in reversed(range(len(nodes))):
        node = nodes[number]
        found = set().union(*(readers.get(name, set()) for name in node.output))
        reader = next(iter(found)) if len(found) == 1 else (-1, "")
        if reader[1]:
            inside.setdefault(reader, []).append(number)
            note(graph.reads(node), reader)
            continue
        note((name for name in node.input if name), (number, ""))
        for side, branch in graph.branches(node).items():
            note(branch.outer_reads(), (number, side))
    moved = {id(nodes[number]) for members in inside.values() for number in members}
    for (number, side), members in inside.items():
        graph.branches(nodes[number])[side].prepend(*(nodes[member] for member in sorted(members)))
    return graph.rewrite(lambda node: [] if id(node) in moved else None)


def add_rows(graph: Graph) -> int:
    """Add kept rows with one node, here and in branches.

        GatedScatterAdd(residual, rows, gate, index)      becomes
        rows, gate -> Mul -> ScatterND(residual, index, add)

    without the product if the gate is all ones. Why: the op's body has six nodes. Returns: how many were replaced.
    """
    ones = {name for name in graph.constants if graph.number(name) == 1}
    expanded = {
        node.output[0]
        for part in graph.parts()
        for node in part.nodes
        if node.op_type == "Expand" and node.input[0] in ones
    }
    last = graph.add_constant("lowered.last_axis", [-1])

    def spelled(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "GatedScatterAdd":
            return None
        residual, rows, gate, index = graph.expect_inputs(node, 4)
        out, place = node.output[0], f"{node.output[0]}.place"
        nodes = [make_node("Unsqueeze", [index, last], place)]
        if gate not in expanded:
            gated = f"{out}.gated"
            nodes.append(make_node("Mul", [gate, rows], gated))
            rows = gated
        return [*nodes, make_node("ScatterND", [residual, place, rows], out, reduction="add")]

    return sum(part.rewrite(spelled) for part in graph.parts())


def spread_columns(graph: Graph) -> int:
    """Give the matrix of a product with one column three axes.

        [.., H] x [H, 1] -> MatMul      becomes      [.., H] x [1, H, 1] -> MatMul -> Reshape [-1, 1]

    Why: ONNX Runtime packs constant matrices of two axes into panels of 16 columns, and then computes 16 columns: a
    gate's scores of 512 tokens took 790 microseconds, and 25 in this form. Returns: how many were changed.
    """
    column = graph.add_constant("lowered.column", [-1, 1])
    columns = {name for name, weight in graph.constants.items() if len(weight.dims) == 2 and weight.dims[1] == 1}

    def spread(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "MatMul" or node.input[1] not in columns:
            return None
        weight = graph.constants[node.input[1]]
        if len(weight.dims) == 2:  # not yet: a looped model's gate is read after each loop
            weight.dims.insert(0, 1)
        out, spread_out = node.output[0], f"{node.output[0]}.apart"
        node.output[0] = spread_out
        return [node, make_node("Reshape", [spread_out, column], out)]

    return graph.rewrite(spread)


def keep_sequence_axis(graph: Graph, task: Task) -> int:
    """Keep the sequence axis of a dense model's states, so that attention need not add it; see `keep_axis`.

    Returns: how many nodes were removed.
    """
    if task.steps or task.indices:
        return 0
    return keep_axis(graph, task.first_input, task.last_output)


def keep_axis(graph: Graph, first: str, last: str) -> int:
    """Keep the axis of the sequence in its states: [1, N, H] instead of [N, H].

        [N, H] -> (layers, with Unsqueeze before and Reshape after attention) -> [N, H] -> Reshape      becomes
        [N, H] -> Unsqueeze -> (layers) -> [1, N, H]

    Args:
        first: the state that enters the layers, [N, H].
        last: the state that leaves them, which is reshaped to [1, S, H] after them.
    Returns: how many nodes were removed; 0 if some node cannot take the further axis (norms of heads).
    """
    start = next((number for number, node in enumerate(graph.nodes) if first in node.input), 0)
    lifted, attended = {first}, set[str]()
    aliases: dict[str, str] = {}
    for node in graph.nodes[start:]:
        inputs = [aliases.get(name, name) for name in node.input]
        touched = lifted.intersection(inputs)
        if node.op_type == "GroupQueryAttention":
            attended.add(node.output[0])
        elif node.op_type == "Reshape" and (inputs[0] in attended or node.input[0] == last):
            aliases[node.output[0]] = inputs[0]
            lifted.add(inputs[0])
        elif not touched:
            continue
        elif node.op_type == "Unsqueeze" and graph.number(node.input[1]) == 0:
            aliases[node.output[0]] = inputs[0]
        elif node.op_type in _ROW_BY_ROW:
            lifted.update(node.output)
        elif node.op_type != "RotaryEmbedding":
            return 0
    entering = make_node("Unsqueeze", [first, graph.add_constant("lowered.sequence_axis", [0])], f"{first}.of_sequence")
    graph.insert_before(graph.nodes[start], entering)
    graph.rewrite(lambda node: [] if node.output[0] in aliases else None)
    graph.reroute(aliases)
    for node in graph.users(first):
        if node is not entering:
            graph.set_inputs(node, [entering.output[0] if name == first else name for name in node.input])
    return len(aliases)


def drop_index_reshapes(graph: Graph, task: Task) -> int:
    """Drop the flattening of the numbers of kept rows, which have one axis already; see `drop_flat_reshapes`."""
    return drop_flat_reshapes(graph, task.indices)


def drop_flat_reshapes(graph: Graph, flat: Iterable[str]) -> int:
    """Drop Reshape([-1]) of values that have only one axis, in branches too.

        index -> Reshape([-1]) -> (a reader)      becomes      index -> (the reader)

    Args: flat: names of such values.
    Returns: how many were dropped.
    """
    has_one = set(flat)
    aliases: dict[str, str] = {}

    def flattens(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "Reshape" or node.input[0] not in has_one or graph.number(node.input[1]) != -1:
            return None
        aliases[node.output[0]] = node.input[0]
        return []

    for part in graph.parts():
        part.rewrite(flattens)
    graph.reroute(aliases)
    return len(aliases)
