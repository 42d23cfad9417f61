"""Branches that the host decides on for a whole call: their number of rows is the size of an input, all rows or none.

A set of layers, or a number of loops, is chosen for a sequence, not for a token. Within a sequence only the tokens
below `full_until` differ, which run every branch; the runner never mixes these with others in one call, nor sequences
with different sets. So the host knows before the call how many rows each branch runs on, and nothing has to ask the
GPU. The number is the *size* of an input `run.<layer>.<branch>`, whose content nobody reads. TensorRT knows sizes when
it prepares a call, so the call needs no plugin, waits for nothing, and can be recorded as a CUDA graph, one for each
set. (An `If` does not do: even with its condition on the host TensorRT-RTX 1.7.1 copies it back from the GPU and jumps,
which no CUDA graph holds.)
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import TensorProto, helper

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering.choices import branch_choices
from gsx_engines.lowering.for_tensorrt.task import RUN, Task
from gsx_plugins.graph import Graph, attribute, make_node

# Makes the node that cuts rows: (value, n, output).
Cut = Callable[[str, str, str], onnx.NodeProto]
# What a rule may read for its decisions to be the host's: all of it is the same for a sequence, but for `full_until`.
_OF_A_SEQUENCE = {"layer_mask", "full_until", "loops"}


def is_decided_by_host(manifest: Manifest) -> bool:
    """Whether a bundle's rule decides for whole sequences, by what the host gives it."""
    names = {value.name for value in manifest.policy.inputs} if manifest.policy is not None else set()
    return bool(names & {"layer_mask", "loops"}) and names <= _OF_A_SEQUENCE


def run_whole_calls(graph: Graph, task: Task) -> int:
    """Take the number of rows of each branch from the size of an input; they are the first rows: all, or none.

        x, score, bound -> ThresholdGather -> rows, index, count      becomes      Shape(run) -> n;  x[:n] -> rows
        t -> Gather(index) -> its rows                becomes      t[:n]
        z, rows -> ScatterND at index -> z with them  becomes      Concat(rows, z[n:])
        residual, rows, gate, index -> GatedScatterAdd -> out         becomes
        Concat(residual[:n] + gate x rows, residual[n:]) -> out

    Attention of these rows is for later passes: `task.whole_rows` has their number. Returns: how many branches.
    """
    if not task.in_place or not is_decided_by_host(task.manifest):
        return 0
    first, rest = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.to_the_end", [2**62])
    choices = {node.output[1]: node for node in branch_choices(graph)}
    numbers: dict[str, str] = {}  # index, or what is made of it -> n [1]

    def head(x: str, n: str, out: str, axis: int = 0) -> onnx.NodeProto:
        return make_node("Slice", [x, first, n, graph.add_constant(f"lowered.only_axis_{axis}", [axis])], out)

    def tail(x: str, n: str, out: str) -> onnx.NodeProto:
        return make_node("Slice", [x, n, rest, first], out)

    def whole(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        op, out = node.op_type, node.output[0] if node.output else ""
        if len(node.output) == 3 and node.output[1] in choices:
            rows, index, count = node.output
            n, given = f"{index}.n", RUN + index.removeprefix("layers.").removesuffix(".index")
            numbers[index] = n
            task.forms[op] = "rows"
            graph.proto.input.append(helper.make_tensor_value_info(given, TensorProto.BOOL, [given]))
            return [make_node("Shape", [given], n), head(node.input[0], n, rows), make_node("Squeeze", [n], count)]
        known = [numbers[name] for name in node.input if name in numbers]
        if not known:
            return None
        n = known[0]
        if op in ("Reshape", "Unsqueeze"):
            numbers[out] = n
            return []
        if op == "Gather" and node.input[1] in numbers:
            return [head(node.input[0], n, out, attribute(node, "axis") or 0)]
        if op == "ScatterND":
            below, _, rows = graph.expect_inputs(node, 3)
            return [tail(below, n, f"{out}.others"), make_node("Concat", [rows, f"{out}.others"], out, axis=0)]
        if op == "GatedScatterAdd":
            task.forms[op] = "rows"
            return _added(graph, task, node, head, tail, n)
        if op == "GatheredAttention":
            task.whole_rows[node.input[1]] = n
            return None
        raise graph.error(node, "a node that takes rows, or puts them back", op)

    graph.rewrite(whole)
    graph.drop_unread()  # with the scores, which were read for the choices alone
    graph.keep_inputs(lambda name: name not in _OF_A_SEQUENCE or bool(graph.users(name)))
    return len(choices)


def _added(graph: Graph, task: Task, node: onnx.NodeProto, head: Cut, tail: Cut, n: str) -> list[onnx.NodeProto]:
    """The residual with the rows of a branch added to its first ones; in a step, its size is said again."""
    residual, rows, gate, _ = graph.expect_inputs(node, 4)
    out = node.output[0]
    nodes = []
    if not _is_ones(graph, gate):
        nodes.append(make_node("Mul", [gate, rows], f"{out}.gated"))
        rows = f"{out}.gated"
    return [
        *nodes,
        head(residual, n, f"{out}.before"),
        make_node("Add", [f"{out}.before", rows], f"{out}.changed"),
        tail(residual, n, f"{out}.others"),
        *_of_all_rows(graph, task, [f"{out}.changed", f"{out}.others"], out),
    ]


def _of_all_rows(graph: Graph, task: Task, parts: list[str], out: str) -> list[onnx.NodeProto]:
    """States [N, H] joined from two parts. In a step, TensorRT does not see that they are as many as the tokens."""
    if task.step is None:
        return [make_node("Concat", parts, out, axis=0)]
    batch, tokens = task.step
    size = graph.add_constant("lowered.step_states", [batch * tokens, task.shape.hidden_size])
    return [make_node("Concat", parts, f"{out}.joined", axis=0), make_node("Reshape", [f"{out}.joined", size], out)]


def _is_ones(graph: Graph, value: str) -> bool:
    """Whether a value is 1 everywhere, at any size: a constant that is cast and expanded."""
    while (node := graph.producer(value)) is not None and node.op_type in ("Cast", "Expand"):
        value = node.input[0]
    return graph.number(value) == 1.0
