"""What is asked at every branch, in as few nodes as it takes.

A node of a few numbers costs a single step some two microseconds, since the weights that are read meanwhile push all
else out of the processor's caches (measured: benchmarks/RESULTS.md), and a branch that is skipped consists of nothing
but what was asked. So

- a choice by threshold is spelled out, so that `trim.sink` finds what an entered branch alone reads (rows, their
  numbers), and the `If` asks whether any row is kept;
- bounds of all branches are made together once in a call, with the tokens that must run, or must not, put in;
- where the scores themselves are known when the call begins (sets of layers), everything is decided at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.bundle.fields import BRANCHES
from gsx_engines.lowering.nodes import replace_nodes
from gsx_engines.lowering.regions import any_name, branch_choices, is_choice

# The output with the kept rows of every branch: how many, or in steps which ones.
KEPT = "kept"
_THRESHOLDS = "thresholds"
# Values inside: the numbers of all rows of the call; what is decided at once.
_ROWS, _TOGETHER = "lowered.rows", "lowered.together"


@dataclass(frozen=True)
class _Together:
    """What is known of all branches when the call begins.

    Args:
        nodes: that make it.
        scores: the value that each choice (by the name of its index) compares, and with which bound.
        kept: the table [P, N] of what is kept, where that is known too.
    """

    nodes: Sequence[onnx.NodeProto]
    scores: Mapping[str, tuple[str, str]]
    kept: str | None = None


def decide(graph: onnx.GraphProto, depth: int, *, steps: bool) -> None:
    """Spell out the choices of a graph whose branches stand behind `If`, in place, and give `KEPT`.

    Args:
        depth: layers of the model.
        steps: whether a row is a sequence, so that `KEPT` tells which ones are kept, [P x B] bool; else it is how many,
            [P] int64. P: branches that may be skipped, in order.
    """
    choices = branch_choices(graph)
    if not choices:
        return
    ranked = choices[0].op_type == "TopKGather"
    read = {name for node in graph.node for name in node.input}
    together = None if ranked else _scores_at_once(graph, choices, depth) or _bounds_at_once(graph, choices, depth)
    decided = together is not None and together.kept is not None
    numbers = {node.output[1]: number for number, node in enumerate(choices)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "TopKGather":
            nodes += [node, *_asked_of_rank(node, read)]
        elif is_choice(node):
            if node is choices[0] and together is not None:
                nodes += together.nodes
            number = numbers.get(node.output[1])
            table = together.kept if decided and together is not None and number is not None else None
            nodes += _spelled(graph, node, read, together, table, number)
        else:
            nodes.append(node)
    if not ranked:
        _constant(graph, f"{_ROWS}.first", np.array(0, np.int64))
        _constant(graph, f"{_ROWS}.step", np.array(1, np.int64))
        count = helper.make_node("Size", ["input_ids"], [f"{_ROWS}.count"])
        rows = helper.make_node("Range", [f"{_ROWS}.first", *count.output, f"{_ROWS}.step"], [_ROWS])
        nodes = [count, rows, *nodes]
    nodes += _kept_output(graph, choices, together, ranked, steps)
    for node in nodes:
        node.name = node.name or node.output[0]
    replace_nodes(graph, nodes)
    dtype = TensorProto.BOOL if steps else TensorProto.INT64
    graph.output.append(helper.make_tensor_value_info(KEPT, dtype, [None]))


def _asked_of_rank(choice: onnx.NodeProto, read: set[str]) -> list[onnx.NodeProto]:
    """Whether any row is kept, and how many, of a choice by rank."""
    nodes = [helper.make_node("Shape", [choice.output[1]], [_size(choice)])]
    if any_name(choice) in read:
        nodes.append(helper.make_node("Cast", [_size(choice)], [any_name(choice)], to=TensorProto.BOOL))
    return nodes


def _spelled(
    graph: onnx.GraphProto,
    choice: onnx.NodeProto,
    read: set[str],
    together: _Together | None,
    table: str | None,
    number: int | None,
) -> list[onnx.NodeProto]:
    """ThresholdGather in standard ops, and whether any row is kept."""
    x, *compared = choice.input
    rows, index, _ = choice.output
    nodes = []
    if table is not None:
        place = _constant(graph, f"{index}.place", np.array(number))
        nodes.append(helper.make_node("Gather", [table, place], [_kept(choice)], axis=0))
    else:
        if together is not None and index in together.scores:
            compared = list(together.scores[index])
        nodes.append(helper.make_node("Greater", compared, [_kept(choice)]))
        if any_name(choice) in read:
            nodes.append(helper.make_node("ReduceMax", [_kept(choice)], [any_name(choice)], keepdims=0))
    return [
        *nodes,
        helper.make_node("Compress", [_ROWS, _kept(choice)], [index], axis=0),
        helper.make_node("Gather", [x, index], [rows], axis=0),
    ]


def _scores_at_once(graph: onnx.GraphProto, choices: Sequence[onnx.NodeProto], depth: int) -> _Together | None:
    """Decide all branches, if every score is a part of one table [L, 2, N], and the bound a constant."""
    producer = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    tables = {_table_of(choice.input[1], producer) for choice in choices}
    bounds = {
        numpy_helper.to_array(constants[choice.input[2]]).item() if choice.input[2] in constants else None
        for choice in choices
    }
    if len(tables) != 1 or len(bounds) != 1 or None in tables | bounds:
        return None
    rows = _constant(graph, f"{_TOGETHER}.shape", np.array([depth * len(BRANCHES), -1]))
    places = _constant(graph, f"{_TOGETHER}.places", np.array([_place(choice) for choice in choices]))
    axis = _constant(graph, f"{_TOGETHER}.axis", np.array([1]))
    flat, own, kept, some = (f"{_TOGETHER}.{name}" for name in ("scores", "own", "kept", "any"))
    table = next(iter(tables))
    nodes = [
        helper.make_node("Reshape", [table, rows], [flat]),
        helper.make_node("Gather", [flat, places], [own], axis=0),
        helper.make_node("Greater", [own, choices[0].input[2]], [kept]),
        helper.make_node("ReduceMax", [kept, axis], [some], keepdims=0),
        helper.make_node("Split", [some], [any_name(choice) for choice in choices], num_outputs=len(choices)),
    ]
    return _Together(nodes, {}, kept)


def _bounds_at_once(graph: onnx.GraphProto, choices: Sequence[onnx.NodeProto], depth: int) -> _Together | None:
    """Make the bounds of all branches, if each is a part of `thresholds`; what must run is put into them.

    Where(forced, forced score, score) > threshold is score > Where(forced, -inf or inf, threshold): minus infinity
    where the forced score is above the threshold. The same for finite scores; those compared with thresholds are.
    """
    producer = {name: node for node in graph.node for name in node.output}
    if {_table_of(choice.input[2], producer) for choice in choices} != {_THRESHOLDS}:
        return None
    judged = [producer[choice.input[1]] for choice in choices]
    forced = {tuple(node.input[:2]) if node.op_type == "Where" else None for node in judged}
    puts_in = len(forced) == 1 and None not in forced
    rows = _constant(graph, f"{_TOGETHER}.shape", np.array([-1, 1] if puts_in else [-1]))
    places = _constant(graph, f"{_TOGETHER}.places", np.array([_place(choice) for choice in choices]))
    flat, own = f"{_TOGETHER}.thresholds", f"{_TOGETHER}.own"
    nodes = [
        helper.make_node("Reshape", [_THRESHOLDS, rows], [flat]),
        helper.make_node("Gather", [flat, places], [own], axis=0),
    ]
    if puts_in:
        pair = next(iter(forced))
        assert pair is not None
        over, always, bounds, row = (f"{_TOGETHER}.{name}" for name in ("over", "always", "bounds", "row"))
        below = _constant(graph, f"{_TOGETHER}.below", np.array(-np.inf, np.float32))
        above = _constant(graph, f"{_TOGETHER}.above", np.array(np.inf, np.float32))
        line = _constant(graph, f"{_TOGETHER}.line", np.array([-1]))
        nodes += [
            helper.make_node("Greater", [pair[1], own], [over]),
            helper.make_node("Where", [over, below, above], [always]),
            helper.make_node("Where", [pair[0], always, own], [bounds]),
            helper.make_node("Reshape", [bounds, line], [row]),
        ]
        own = row
    names = [f"{_TOGETHER}.bound.{choice.output[1]}" for choice in choices]
    nodes.append(helper.make_node("Split", [own], names, num_outputs=len(choices)))
    scores = [node.input[2] if puts_in else choice.input[1] for node, choice in zip(judged, choices, strict=True)]
    compared = zip(scores, names, strict=True)
    return _Together(nodes, {choice.output[1]: pair for choice, pair in zip(choices, compared, strict=True)})


def _table_of(part: str, producer: Mapping[str, onnx.NodeProto]) -> str | None:
    """The table [L, 2, ..] that a value is the part of a layer and branch of."""
    for _ in range(2):
        node = producer.get(part)
        if node is None or node.op_type != "Gather" or any(a.name == "axis" and a.i for a in node.attribute):
            return None
        part = node.input[0]
    return part


def _place(choice: onnx.NodeProto) -> int:
    """Where a branch stands in a flat table [L x 2]."""
    _, layer, branch, _ = choice.output[1].split(".")
    return int(layer) * len(BRANCHES) + [str(name) for name in BRANCHES].index(branch)


def _kept_output(
    graph: onnx.GraphProto, choices: Sequence[onnx.NodeProto], together: _Together | None, ranked: bool, steps: bool
) -> list[onnx.NodeProto]:
    """The kept rows of every branch, in order."""
    if ranked:
        return [helper.make_node("Concat", [_size(choice) for choice in choices], [KEPT], axis=0)]
    line = _constant(graph, f"{KEPT}.line", np.array([-1]))
    table = together.kept if together is not None else None
    joined = helper.make_node("Concat", [_kept(c) for c in choices], [KEPT if steps else f"{KEPT}.line.all"], axis=0)
    if steps:
        return [joined] if table is None else [helper.make_node("Reshape", [table, line], [KEPT])]
    nodes = []
    if table is None:
        shape = _constant(graph, f"{KEPT}.shape", np.array([len(choices), -1]))
        table = f"{KEPT}.table"
        nodes = [joined, helper.make_node("Reshape", [*joined.output, shape], [table])]
    axis = _constant(graph, f"{KEPT}.axis", np.array([1]))
    return [
        *nodes,
        helper.make_node("Cast", [table], [f"{KEPT}.numbers"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", [f"{KEPT}.numbers", axis], [KEPT], keepdims=0),
    ]


def _kept(choice: onnx.NodeProto) -> str:
    """Which rows a choice keeps, [N] bool."""
    return f"{choice.output[1]}.kept"


def _size(choice: onnx.NodeProto) -> str:
    """How many, [1] int64."""
    return f"{choice.output[2]}.size"


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
