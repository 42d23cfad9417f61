"""Branch regions: the nodes that run over kept rows alone, moved into an `If` that asks whether there are any.

At batch-1 decode a branch keeps one row or none. Nodes over no rows are cheap but not free, and attention refuses
an empty query; an `If` leaves the whole branch out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import helper

from gsx_engines.lowering.nodes import copy_of

CHOICES = ("ThresholdGather", "TopKGather")


def branch_choices(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The choices of rows that branches run on, in order; a keep rule may choose rows to look at, or for a stand-in."""
    ends = (".attn.index", ".mlp.index")
    return [node for node in graph.node if is_choice(node) and node.output[1].endswith(ends)]


def is_choice(node: onnx.NodeProto) -> bool:
    """Whether a node chooses rows."""
    return node.op_type in CHOICES


def any_name(choice: onnx.NodeProto) -> str:
    """The value that says whether a choice keeps any row, which whoever wraps its region makes: one bool."""
    return f"{choice.output[2]}.any"


@dataclass(frozen=True)
class Region:
    """One branch.

    Args:
        choice: of the rows.
        nodes: what runs over them; add: what adds the result to the residual.
        after: what looks at the result, row by row, and puts what it finds into states that go on: their values, and
            what they are without it, are `states`.
    """

    choice: onnx.NodeProto
    nodes: Sequence[onnx.NodeProto]
    add: onnx.NodeProto
    after: Sequence[onnx.NodeProto] = ()
    states: Sequence[tuple[str, str]] = ()

    @property
    def last(self) -> onnx.NodeProto:
        """The one that comes last in the graph."""
        return self.after[-1] if self.after else self.add


def find_regions(graph: onnx.GraphProto, internal_outputs: Iterable[str] = ()) -> list[Region]:
    """All branch regions of a graph, in order.

    A region holds the nodes between a choice and its GatedScatterAdd that no value outside depends on. Nodes whose
    results leave the branch (K and V of kept rows under the K/V policy `copy`) stay outside.

    Args:
        internal_outputs: graph outputs that may be produced inside a region.
    """
    consumers: dict[str, list[int]] = {}
    producer: dict[str, int] = {}
    nodes = list(graph.node)
    for number, node in enumerate(nodes):
        for name in node.input:
            consumers.setdefault(name, []).append(number)
        for name in node.output:
            producer[name] = number
    outputs = {value.name for value in graph.output} - set(internal_outputs)
    choices = {node.output[1]: node for node in nodes if is_choice(node)}
    regions = []
    for end, add in enumerate(nodes):
        if add.op_type != "GatedScatterAdd":
            continue
        choice = choices[add.input[3]]
        members = _reach(choice.output[:2], lambda name: consumers.get(name, []), nodes, "output")
        members &= _reach(add.input[1:], lambda name: [producer[name]] if name in producer else [], nodes, "input")
        members |= {end}
        after, states = _states(choice, end, nodes, consumers, producer)
        inside = members | after
        while True:
            leaving = {
                number
                for number in members - {end}
                if any(
                    name in outputs or any(c not in inside for c in consumers.get(name, []))
                    for name in nodes[number].output
                )
            }
            if not leaving:
                break
            members -= leaving
            inside -= leaving
        parts = ([nodes[n] for n in sorted(part)] for part in (members - {end}, after))
        before, behind = parts
        regions.append(Region(choice, before, add, behind, states))
    return regions


def _states(
    choice: onnx.NodeProto,
    add: int,
    nodes: Sequence[onnx.NodeProto],
    consumers: Mapping[str, list[int]],
    producer: Mapping[str, int],
) -> tuple[set[int], list[tuple[str, str]]]:
    """Nodes behind a branch that scatter what they find of kept rows into states; the states, and what they were."""
    downstream = _reach(nodes[add].output, lambda name: consumers.get(name, []), nodes, "output")
    at = {choice.output[1]}
    for node in nodes:
        if node.op_type in ("Unsqueeze", "Reshape") and node.input[0] in at:
            at.add(node.output[0])
    found: set[int] = set()
    states = []
    for number in sorted(downstream):
        node = nodes[number]
        if node.op_type != "ScatterND" or node.input[1] not in at:
            continue
        behind = _reach(node.input[2:], lambda name: [producer[name]] if name in producer else [], nodes, "input")
        found |= (behind & downstream) | {number}
        states.append((node.output[0], node.input[0]))
    return found, states


def wrap(
    region: Region, carried: Sequence[tuple[str, str]], name: str, carried_type: int = onnx.TensorProto.FLOAT
) -> onnx.NodeProto:
    """The `If` around a region that replaces it; it asks for `any_name`.

    Args:
        carried: (value, fallback) of further values that the region gives: what they are when nothing is kept.
        name: prefix of new values.
        carried_type: of the carried values.
    """
    residual, out = region.add.input[0], region.add.output[0]
    results = [(out, residual), *region.states, *carried]
    then_names = {result: f"{name}then.{result}" for result, _ in results}
    then_nodes = []
    for node in [*region.nodes, region.add, *region.after]:
        copy = copy_of(node)
        copy.input[:] = [then_names.get(n, n) for n in node.input]
        copy.output[:] = [then_names.get(n, n) for n in node.output]
        then_nodes.append(copy)
    else_nodes = [
        helper.make_node("Identity", [fallback], [f"{name}else.{result}"], name=f"{name}else.{result}")
        for result, fallback in results
    ]

    def branch(side: str, nodes: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
        values = [onnx.ValueInfoProto(name=f"{name}{side}.{result}") for result, _ in results]
        for value, pair in zip(values, results, strict=True):
            value.type.tensor_type.elem_type = carried_type if pair in carried else onnx.TensorProto.FLOAT
        return helper.make_graph(nodes, f"{name}{side}", [], values)

    return helper.make_node(
        "If",
        [any_name(region.choice)],
        [result for result, _ in results],
        name=f"{name}if",
        then_branch=branch("then", then_nodes),
        else_branch=branch("else", else_nodes),
    )


def _reach(
    start: Iterable[str],
    step: Callable[[str], Sequence[int]],
    nodes: Sequence[onnx.NodeProto],
    side: Literal["input", "output"],
) -> set[int]:
    """Numbers of all nodes that can be reached from some values."""
    found: set[int] = set()
    pending = list(start)
    while pending:
        for number in step(pending.pop()):
            if number not in found:
                found.add(number)
                pending += [name for name in getattr(nodes[number], side) if name]
    return found
