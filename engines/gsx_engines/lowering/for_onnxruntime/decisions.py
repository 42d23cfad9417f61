"""The decisions of all branches, in as few nodes as possible.

A node on a few numbers costs a single step about two microseconds, since the weights that are read in between push
everything else out of the processor's caches (measured: benchmarks/RESULTS.md), and a skipped branch consists only of
its decision. So

- a choice by threshold is written out in standard ops, so that `trim.sink` finds what only an entered branch reads
  (rows, their numbers), and the `If` tests whether any row is kept;
- the bounds of all branches are computed together once per call, including the tokens that must run, or must not;
- where the scores themselves are known when the call begins (sets of layers), everything is decided at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from gsx_engines.bundle.words import BRANCHES
from gsx_engines.lowering.choices import branch_choices, is_choice
from gsx_engines.lowering.for_onnxruntime.regions import any_name
from gsx_engines.lowering.for_onnxruntime.task import Task
from gsx_plugins.graph import Graph, attribute, make_node

# The output with the kept rows of every branch: which ones, or with selection by rank how many.
KEPT = "kept"
# The table of kept rows, [P, N] bool, where all branches are decided at once.
TOGETHER_KEPT = "lowered.together.kept"
# How many axes a table has by which a branch finds its part: those of layers, and of branches.
_BY_LAYER, _BY_BRANCH = 1, 2
# Internal values: the numbers of all rows of the call; the decisions that are made at once.
_ROWS, _TOGETHER = "lowered.rows", "lowered.together"


@dataclass(frozen=True)
class _Together:
    """What is known about all branches when the call begins.

    Args:
        nodes: the nodes that compute it.
        scores: for each choice, by the name of its index, the value that it compares, and the bound.
        kept: the table [P, N] of kept rows, if that is known too.
    """

    nodes: Sequence[onnx.NodeProto]
    scores: Mapping[str, tuple[str, str]]
    kept: str | None = None


def decide(graph: Graph, task: Task) -> int:
    """Write out the choices of a graph whose branches are inside `If`, and add the output of kept rows.

        x, score, bound -> ThresholdGather -> rows, index, count      becomes
        score > bound -> kept; kept -> ReduceMax -> any; kept -> Compress -> index; x -> Gather(index) -> rows

    TopKGather stays; count and `any` are computed from its index. The output `KEPT` says which rows each branch that
    may be skipped keeps, [P x N] bool; with selection by rank how many, [P] int64. P: branches, in order. Returns: the
    number of choices.
    """
    choices = branch_choices(graph)
    if not choices:
        return 0
    ranked = choices[0].op_type == "TopKGather"
    depth = task.shape.num_layers
    together = None if ranked else _scores_at_once(graph, choices, depth) or _bounds_at_once(graph, choices, depth)
    numbers = {node.output[1]: number for number, node in enumerate(choices)}
    read = {name for node in graph.nodes for name in node.input}

    def spelled(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if not is_choice(node):
            return None
        needs_any = any_name(node) in read
        if node.op_type == "TopKGather":
            return [node, *_counted(node, needs_any)]
        before = together.nodes if together is not None and node is choices[0] else ()
        return [*before, *_spelled(graph, node, needs_any, together, numbers.get(node.output[1]))]

    count = graph.rewrite(spelled)
    if not ranked:
        first, step = graph.add_constant(f"{_ROWS}.first", 0), graph.add_constant(f"{_ROWS}.step", 1)
        size = f"{_ROWS}.count"
        graph.prepend(make_node("Size", ["input_ids"], size), make_node("Range", [first, size, step], _ROWS))
    graph.append(*_kept_output(graph, choices, together, ranked))
    dtype = TensorProto.INT64 if ranked else TensorProto.BOOL
    graph.proto.output.append(helper.make_tensor_value_info(KEPT, dtype, [None]))
    return count


def _counted(choice: onnx.NodeProto, needs_any: bool) -> list[onnx.NodeProto]:
    """Nodes for the number of rows that a choice by rank keeps and, if some node reads it, for whether it keeps any."""
    nodes = [make_node("Shape", [choice.output[1]], _size(choice))]
    if needs_any:
        nodes.append(make_node("Cast", [_size(choice)], any_name(choice), to=TensorProto.BOOL))
    return nodes


def _spelled(
    graph: Graph, choice: onnx.NodeProto, needs_any: bool, together: _Together | None, number: int | None
) -> list[onnx.NodeProto]:
    """ThresholdGather in standard ops and, if some node reads it, whether any row is kept.

    Args: number: the branch's number; None for a choice that does not belong to a branch.
    """
    x, *compared = graph.expect_inputs(choice, 3)
    rows, index, _ = choice.output
    nodes = []
    if together is not None and together.kept is not None and number is not None:
        place = graph.add_constant(f"{index}.place", number)
        nodes.append(make_node("Gather", [together.kept, place], _kept(choice), axis=0))
    else:
        if together is not None and index in together.scores:
            compared = list(together.scores[index])
        nodes.append(make_node("Greater", compared, _kept(choice)))
        if needs_any:
            nodes.append(make_node("ReduceMax", [_kept(choice)], any_name(choice), keepdims=0))
    return [
        *nodes,
        make_node("Compress", [_ROWS, _kept(choice)], index, axis=0),
        make_node("Gather", [x, index], rows, axis=0),
    ]


def _scores_at_once(graph: Graph, choices: Sequence[onnx.NodeProto], depth: int) -> _Together | None:
    """Decide all branches at once, if every score is a part of one table [L, 2, N], and the bound is a constant."""
    tables = {_table_of(graph, choice.input[1]) for choice in choices}
    bounds = {graph.number(choice.input[2]) for choice in choices}
    table, axes = next(iter(tables))
    if axes != _BY_BRANCH or len(tables) != 1 or len(bounds) != 1 or None in bounds:
        return None
    rows = graph.add_constant(f"{_TOGETHER}.shape", np.array([depth * len(BRANCHES), -1]))
    places = graph.add_constant(f"{_TOGETHER}.places", np.array([_place(graph, choice) for choice in choices]))
    axis = graph.add_constant(f"{_TOGETHER}.axis", np.array([1]))
    flat, own, some = (f"{_TOGETHER}.{name}" for name in ("scores", "own", "any"))
    kept = TOGETHER_KEPT
    nodes = [
        make_node("Reshape", [table, rows], flat),
        make_node("Gather", [flat, places], own, axis=0),
        make_node("Greater", [own, choices[0].input[2]], kept),
        make_node("ReduceMax", [kept, axis], some, keepdims=0),
        _split(some, [any_name(choice) for choice in choices]),
    ]
    return _Together(nodes, {}, kept)


def _bounds_at_once(graph: Graph, choices: Sequence[onnx.NodeProto], depth: int) -> _Together | None:
    """Compute the bounds of all branches at once, if each is a part of one table [L, 2, N] or [L, N]; forced tokens are
    put into them.

    Where(forced, forced score, score) > threshold is score > Where(forced, -inf or inf, threshold): minus infinity
    where the forced score is above the threshold. Both are the same for scores above minus infinity, and scores that
    are compared with thresholds are.
    """
    tables = {_table_of(graph, choice.input[2]) for choice in choices}
    table, axes = next(iter(tables))
    if not axes or len(tables) != 1:
        return None
    scorers = [graph.expect_producer(choice.input[1]) for choice in choices]
    forced = {tuple(node.input[:2]) if node.op_type == "Where" else () for node in scorers}
    puts_in = len(forced) == 1 and () not in forced
    by_layer = len(BRANCHES) if axes == _BY_LAYER else 1
    rows = graph.add_constant(f"{_TOGETHER}.shape", np.array([depth * len(BRANCHES) // by_layer, -1]))
    places = [_place(graph, choice) // by_layer for choice in choices]
    graph.add_constant(f"{_TOGETHER}.places", np.array(places))
    flat, own = f"{_TOGETHER}.thresholds", f"{_TOGETHER}.own"
    nodes = [
        make_node("Reshape", [table, rows], flat),
        make_node("Gather", [flat, f"{_TOGETHER}.places"], own, axis=0),
    ]
    if puts_in:
        force, score = next(iter(forced))
        over, always, bounds = (f"{_TOGETHER}.{name}" for name in ("over", "always", "bounds"))
        below = graph.add_constant(f"{_TOGETHER}.below", np.array(-np.inf, np.float32))
        above = graph.add_constant(f"{_TOGETHER}.above", np.array(np.inf, np.float32))
        nodes += [
            make_node("Greater", [score, own], over),
            make_node("Where", [over, below, above], always),
            make_node("Where", [force, always, own], bounds),
        ]
        own = bounds
    line, row = graph.add_constant(f"{_TOGETHER}.line", np.array([-1])), f"{_TOGETHER}.row"
    names = [f"{_TOGETHER}.bound.{choice.output[1]}" for choice in choices]
    nodes += [make_node("Reshape", [own, line], row), _split(row, names)]
    scores = [node.input[2] if puts_in else choice.input[1] for node, choice in zip(scorers, choices, strict=True)]
    compared = zip(scores, names, strict=True)
    return _Together(nodes, {choice.output[1]: pair for choice, pair in zip(choices, compared, strict=True)})


def _split(value: str, names: Sequence[str]) -> onnx.NodeProto:
    return helper.make_node("Split", [value], list(names), name=names[0], num_outputs=len(names))


def _table_of(graph: Graph, part: str) -> tuple[str, int]:
    """The table [L, 2, ..] or [L, ..] from which a value is gathered by layer and branch, or by layer, and how many of
    these axes it has; none if the value is not gathered."""
    axes = 0
    while axes < _BY_BRANCH:
        node = graph.producer(part)
        if node is None or node.op_type != "Gather" or attribute(node, "axis"):
            break
        part, axes = node.input[0], axes + 1
    return part, axes


def _place(graph: Graph, choice: onnx.NodeProto) -> int:
    """The position of a branch in a flat table [L x 2]."""
    parts = choice.output[1].split(".")
    known = len(parts) == 4 and parts[1].isdigit() and parts[2] in BRANCHES
    graph.expect(known, choice, "numbers of rows called `layers.NUMBER.BRANCH.index`", repr(choice.output[1]))
    return int(parts[1]) * len(BRANCHES) + [str(name) for name in BRANCHES].index(parts[2])


def _kept_output(
    graph: Graph, choices: Sequence[onnx.NodeProto], together: _Together | None, ranked: bool
) -> list[onnx.NodeProto]:
    """Nodes for the output of the kept rows of every branch, in order."""
    if ranked:
        return [make_node("Concat", [_size(choice) for choice in choices], KEPT, axis=0)]
    if together is not None and together.kept is not None:
        return [make_node("Reshape", [together.kept, graph.add_constant(f"{KEPT}.line", [-1])], KEPT)]
    return [make_node("Concat", [_kept(choice) for choice in choices], KEPT, axis=0)]


def _kept(choice: onnx.NodeProto) -> str:
    """Name of the value that says which rows a choice keeps, [N] bool."""
    return f"{choice.output[1]}.kept"


def _size(choice: onnx.NodeProto) -> str:
    """Name of the value that says how many rows a choice keeps, [1] int64."""
    return f"{choice.output[2]}.size"
