"""Branches that run for all rows of a call or for none: nothing is gathered, and nothing is put back.

A set of layers is chosen for a sequence, not for a token. Within a sequence only the tokens below `full_until` differ,
which run every branch; the runner never mixes them with others in one call. So inside a branch all rows are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from gsx_engines.lowering.for_onnxruntime.decisions import TOGETHER_KEPT
from gsx_engines.lowering.for_onnxruntime.regions import changed_state
from gsx_engines.lowering.for_onnxruntime.task import FIRST, Task, attention_node, chooses_whole_calls, layer_of
from gsx_engines.lowering.kv_cache import KINDS
from gsx_plugins.graph import Graph, make_node


def run_all_rows(graph: Graph, task: Task) -> int:
    """Inside the branches of a rule that chooses whole calls, run on the rows as they are.

        Gather(x, index) -> rows      becomes      x
        ScatterND(residual, index, rows, add)      becomes      Add(residual, rows)
        Where(kept, changed, unchanged) -> residual      becomes      changed
        K, V -> ScatterND(zeros, index) -> TensorScatter(past) -> appended; rows, appended -> GroupQueryAttention
            becomes      rows, K, V, past -> GroupQueryAttention

    The last only where the branch writes K and V (`Task.writes_in_branch`); the output `appended`
    goes then, since attention writes into the buffer itself. Why: a branch that runs costs what the same part
    of a dense model costs. Returns: how many branches; 0 if some node reads what attention wrote.
    """
    if task.steps or not chooses_whole_calls(task.manifest):
        return 0
    branches = list(_branches(graph))
    if any(branch.index is None or graph.users(name) for branch in branches for name in branch.written):
        return 0
    for branch in branches:
        _run_all(graph, task, branch)
    written = {name for branch in branches for name in branch.written}
    graph.set_outputs([value for value in graph.proto.output if value.name not in written])
    graph.drop_unread()
    return len(branches)


@dataclass(frozen=True)
class _Branch:
    """One branch: the `If`, its inside, the numbers of the kept rows, and the outputs with what attention wrote."""

    node: onnx.NodeProto
    inside: Graph
    index: str | None
    written: tuple[str, ...]


def _branches(graph: Graph) -> Iterator[_Branch]:
    for node in graph.nodes:
        inside = graph.branches(node).get("then_branch")
        if inside is None:
            continue
        chosen = [one for one in inside.nodes if one.op_type == "Compress"]
        kept = inside.producer(chosen[0].input[1]) if len(chosen) == 1 else None
        together = kept is not None and kept.input[0] == TOGETHER_KEPT
        written = tuple(name for name in node.output if name.startswith("appended."))
        yield _Branch(node, inside, chosen[0].output[0] if together else None, written)


def _run_all(graph: Graph, task: Task, branch: _Branch) -> None:
    """Rewrite one branch."""
    inside, index = branch.inside, branch.index
    places = {index} | {node.output[0] for node in inside.nodes if index in node.input and node.op_type == "Unsqueeze"}
    same: dict[str, str] = {}

    def rows(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "Gather" and node.input[1] == index:
            same[node.output[0]] = node.input[0]
            return []
        if node.op_type == "ScatterND" and node.input[1] in places:
            if any(one.name == "reduction" for one in node.attribute):
                changed = changed_state(inside, node.input[0])
                state = node.input[0] if changed is None else changed.input[1]
                return [make_node("Add", [state, node.input[2]], node.output[0])]
            same[node.output[0]] = node.input[2]
            return []
        return None

    inside.rewrite(rows)
    for name in same:
        while same[name] in same:
            same[name] = same[same[name]]
    inside.reroute(same)
    for node in list(inside.nodes) if branch.written else ():
        if node.op_type == "GroupQueryAttention":
            inside.replace(node, *_appending(graph, task, inside, node))
    for one in graph.branches(branch.node).values():
        gone = [number for number, name in enumerate(branch.node.output) if name in branch.written]
        one.set_outputs([value for number, value in enumerate(one.proto.output) if number not in gone])
    branch.node.output[:] = [name for name in branch.node.output if name not in branch.written]


def _appending(graph: Graph, task: Task, inside: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Attention over all rows, which appends K and V itself."""
    layer = layer_of(graph, node)
    key, value = (_rows_behind(inside, name) for name in node.input[3:5])
    of_first = inside.expect_producer(key, "Gather")  # the rotated keys have the sequence's axis before it is taken off
    shaped = f"layers.{layer}.lowered.value"
    past = (task.shape.past_of(layer, KINDS[0]), task.shape.past_of(layer, KINDS[1]))
    attention = attention_node(graph, task, node, node.input[0], (of_first.input[0], shaped), past, node.output)
    return [make_node("Unsqueeze", [value, FIRST], shaped), attention]


def _rows_behind(inside: Graph, written: str) -> str:
    """The rows of K or V that are written into a buffer."""
    new = inside.expect_producer(written, "TensorScatter").input[1]
    if inside.expect_producer(new).op_type == "QuantizeLinear":
        new = inside.expect_producer(new).input[0]
    split = inside.expect_producer(inside.expect_producer(new, "Transpose").input[0], "Reshape")
    return split.input[0]
