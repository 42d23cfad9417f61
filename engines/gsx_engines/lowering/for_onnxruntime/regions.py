"""Branch regions: the nodes that run only over kept rows, moved into an `If` that tests whether there are any.

In decoding with batch 1 a branch keeps one row or no row. Nodes over no rows are cheap but not free, and attention
refuses an empty query; an `If` skips the whole branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto, helper

from gsx_engines.lowering.choices import is_choice
from gsx_engines.lowering.for_onnxruntime.task import Task, appended
from gsx_engines.lowering.kv_cache import KINDS
from gsx_plugins.graph import Graph, copy_of, make_node


def any_name(choice: onnx.NodeProto) -> str:
    """Name of the value that says whether a choice keeps any row: one bool, computed by `decisions.decide`."""
    return f"{choice.output[2]}.any"


def wrap_branches(graph: Graph, task: Task) -> int:
    """Move the nodes of each branch into an `If`, which is not entered when no row is kept.

        choice -> rows, index; rows -> (the branch) -> GatedScatterAdd(residual) -> out      becomes
        choice -> count.any -> If (then: the branch and GatedScatterAdd; else: residual) -> out

    The states that the branch's result is put into move too, and so does `present.*`, an output of attention: if the
    branch is skipped, it is what was written (`appended.*`). The write itself may belong to the branch too
    (`Task.writes_in_branch`).
    """
    before = {}
    for layer in task.layers:
        for kv in KINDS:
            before[task.shape.present_of(layer, kv)] = appended(layer, kv)
            if task.writes_in_branch:
                before[appended(layer, kv)] = task.shape.past_of(layer, kv)
    cache_type = TensorProto.FLOAT if task.manifest.kv_cache is None else TensorProto.INT8
    regions = find_regions(graph, before)
    ends = {region.last.output[0]: region for region in regions}
    members = {node.name for region in regions for node in (*region.nodes, region.add, *region.after)}

    def wrapped(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        region = ends.get(node.output[0])
        if region is not None:
            written = [name for member in region.nodes for name in member.output if name in before]
            inside = {name: before[name] for name in written}
            carried = [(name, inside.get(fallback, fallback)) for name, fallback in inside.items()]
            unchanged = _unchanged(graph, region)
            return [_if_around(region, unchanged, carried, f"{region.choice.output[2]}.", cache_type)]
        return [] if node.name in members else None

    graph.rewrite(wrapped)
    return len(regions)


@dataclass(frozen=True)
class Region:
    """The nodes of one branch.

    Args:
        choice: the node that chooses the rows.
        nodes: the nodes that run over the rows; add: the node that adds the result to the residual.
        after: nodes that read the result, row by row, and put values computed from it into states of the keep rule.
            `states` has the names of the new states, each with the name of its value if the branch is skipped.
    """

    choice: onnx.NodeProto
    nodes: Sequence[onnx.NodeProto]
    add: onnx.NodeProto
    after: Sequence[onnx.NodeProto] = ()
    states: Sequence[tuple[str, str]] = ()

    @property
    def last(self) -> onnx.NodeProto:
        """The region's last node in the graph's order."""
        return self.after[-1] if self.after else self.add


def find_regions(graph: Graph, internal_outputs: Iterable[str] = ()) -> list[Region]:
    """All branch regions of a graph, in order.

    A region has the nodes between a choice and its GatedScatterAdd that no value outside depends on. Nodes whose
    results leave the branch (K and V of kept rows under the K/V policy `copy`) stay outside.

    Args:
        internal_outputs: graph outputs that may be produced inside a region.
    Raises:
        LayoutError: rows are added that do not come from a choice.
    """
    links = _Links(graph)
    nodes = links.nodes
    outputs = graph.output_names - set(internal_outputs)
    choices = {node.output[1]: number for number, node in enumerate(nodes) if is_choice(node)}
    regions = []
    for end, add in enumerate(nodes):
        if add.op_type != "GatedScatterAdd":
            continue
        index = graph.expect_inputs(add, 4)[3]
        graph.expect(
            index in choices, add, "rows of a choice", f"the numbers {index!r}, which do not come from a choice"
        )
        start = choices[index]
        choice, span = nodes[start], range(start, end)
        members = links.behind(choice.output[:2], span) & links.before(add.input[1:], span) | {end}
        after, states = _states(choice, end, links)
        inside = members | after
        while True:
            leaving = {
                number
                for number in members - {end}
                if any(name in outputs or not inside.issuperset(links.readers(name)) for name in nodes[number].output)
            }
            if not leaving:
                break
            members -= leaving
            inside -= leaving
        before, behind = ([nodes[n] for n in sorted(part)] for part in (members - {end}, after))
        regions.append(Region(choice, before, add, behind, states))
    return regions


class _Links:
    """Nodes by number, and the nodes that can be reached from values, forwards and backwards."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self._graph = graph
        self._numbers = {id(node): number for number, node in enumerate(self.nodes)}
        self._readers: dict[str, list[int]] = {}

    def readers(self, value: str) -> list[int]:
        """Numbers of the nodes that read a value."""
        found = self._readers.get(value)
        if found is None:
            found = self._readers[value] = [self._numbers[id(node)] for node in self._graph.users(value)]
        return found

    def makers(self, value: str) -> list[int]:
        """The number of the node that produces a value; empty for inputs and constants."""
        node = self._graph.producer(value)
        return [] if node is None else [self._numbers[id(node)]]

    def behind(self, values: Iterable[str], span: range) -> set[int]:
        """Numbers of the nodes in a span that depend on some values, through nodes of the span."""
        return self._reach(values, self.readers, "output", span)

    def before(self, values: Iterable[str], span: range) -> set[int]:
        """Numbers of the nodes in a span that some values depend on, through nodes of the span."""
        return self._reach(values, self.makers, "input", span)

    def _reach(
        self, start: Iterable[str], step: Callable[[str], Sequence[int]], side: Literal["input", "output"], span: range
    ) -> set[int]:
        found: set[int] = set()
        pending = list(start)
        while pending:
            for number in step(pending.pop()):
                if number not in found and number in span:
                    found.add(number)
                    pending += getattr(self.nodes[number], side)
        return found


def _states(choice: onnx.NodeProto, add: int, links: _Links) -> tuple[set[int], list[tuple[str, str]]]:
    """The nodes after a branch that scatter values of kept rows into states; the states, and what they were before."""
    at, scatters = [choice.output[1]], set[int]()
    for name in at:  # grows: the numbers of the rows in other shapes
        for number in links.readers(name):
            node = links.nodes[number]
            if node.op_type in ("Unsqueeze", "Reshape") and node.input[0] == name:
                at.append(node.output[0])
            elif node.op_type == "ScatterND" and node.input[1] == name and number > add:
                scatters.add(number)
    found: set[int] = set()
    states = []
    span = range(add + 1, max(scatters, default=add) + 1)
    downstream = links.behind(links.nodes[add].output, span)
    for number in sorted(scatters & downstream):
        node = links.nodes[number]
        found |= (links.before(node.input[2:], span) & downstream) | {number}
        states.append((node.output[0], node.input[0]))
    return found, states


def changed_state(graph: Graph, residual: str) -> onnx.NodeProto | None:
    """The node that gives kept rows another state than the one that a skipped token keeps, if there is one.

    score > bound -> Unsqueeze -> Where(changed, unchanged) -> residual
    """
    node = graph.producer(residual)
    if node is None or node.op_type != "Where":
        return None
    column = graph.producer(node.input[0])
    kept = graph.producer(column.input[0]) if column is not None and column.op_type == "Unsqueeze" else None
    return node if kept is not None and kept.op_type == "Greater" else None


def _unchanged(graph: Graph, region: Region) -> str:
    """The state that leaves a branch which keeps no row."""
    residual: str = region.add.input[0]
    changed = changed_state(graph, residual)
    return residual if changed is None else str(changed.input[2])


def _if_around(
    region: Region, unchanged: str, carried: Sequence[tuple[str, str]], name: str, carried_type: int
) -> onnx.NodeProto:
    """The `If` that replaces a region; it reads `any_name`.

    Args:
        unchanged: the state that leaves it when nothing is kept.
        carried: (value, fallback) of further outputs of the region; the fallback is used when nothing is kept.
        name: prefix of new values.
        carried_type: element type of the carried values.
    """
    results = [(region.add.output[0], unchanged), *region.states, *carried]
    then_names = {result: f"{name}then.{result}" for result, _ in results}
    then_nodes = []
    for node in [*region.nodes, region.add, *region.after]:
        copy = copy_of(node)
        copy.input[:] = [then_names.get(n, n) for n in node.input]
        copy.output[:] = [then_names.get(n, n) for n in node.output]
        then_nodes.append(copy)
    else_nodes = [make_node("Identity", [fallback], f"{name}else.{result}") for result, fallback in results]

    def branch(side: str, nodes: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
        values = [onnx.ValueInfoProto(name=f"{name}{side}.{result}") for result, _ in results]
        for value, pair in zip(values, results, strict=True):
            value.type.tensor_type.elem_type = carried_type if pair in carried else TensorProto.FLOAT
        return helper.make_graph(nodes, f"{name}{side}", [], values)

    return helper.make_node(
        "If",
        [any_name(region.choice)],
        [result for result, _ in results],
        name=f"{name}if",
        then_branch=branch("then", then_nodes),
        else_branch=branch("else", else_nodes),
    )
