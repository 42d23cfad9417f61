"""An engine's inputs and outputs: where a call's tokens go, which columns get logits, counts, and float32 outside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from gsx_engines.lowering.choices import branch_choices
from gsx_engines.lowering.for_tensorrt.task import (
    KEPT,
    KEPT_BY_TOKEN,
    LOGITS_AT,
    LOGITS_COLUMNS,
    WINDOW,
    WRITE_AT,
    Task,
)
from gsx_plugins.graph import Graph, attribute, make_node


def place_call(graph: Graph, task: Task) -> int:
    """Write the call's tokens at `write_at [B]`, where the portable graph has them after all others.

        Sub(length of attention_mask, length of input_ids)      becomes      Reshape(write_at)
        Slice(x, that) -> the last columns                      becomes      the columns from write_at on

    `attention_mask [B, window]` covers the columns of the cache that are read. Why: sequences have their own lengths
    without padding, and a step keeps its shapes while the cache grows.
    """
    if not task.in_place:
        return 0
    total, length = _lengths_of(graph, "attention_mask"), _lengths_of(graph, "input_ids")
    offsets: dict[str, tuple[str, str]] = {}

    def placed(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "Sub" and node.input[0] in total and node.input[1] in length:
            offsets[node.output[0]] = (node.input[0], node.input[1])
            by_sequence = graph.add_constant("lowered.by_sequence", [-1, 1, 1])  # meets rows [S, 1], columns [W]
            return [make_node("Reshape", [WRITE_AT, by_sequence], node.output[0])]
        if node.op_type == "Slice" and (offset := _before_reshapes(graph, node.input[1])) in offsets:
            return _columns_of_call(graph, node, *offsets[offset])
        return None

    count = graph.rewrite(placed)
    graph.expect(offsets, "value 'attention_mask'", "its length less the call's, where the call begins", "none")
    graph.proto.input.append(helper.make_tensor_value_info(WRITE_AT, TensorProto.INT64, ["batch"]))
    for value in graph.proto.input:
        if value.name == "attention_mask":
            value.type.tensor_type.shape.dim[1].dim_param = WINDOW
    return count


def _lengths_of(graph: Graph, name: str) -> set[str]:
    """The values that equal the length of an input [B, length]."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "Shape" and node.input[0] == name:
            if attribute(node, "start") == 1:
                found.update(node.output)
        elif node.op_type in ("Squeeze", "Reshape") and node.input[0] in found:
            found.update(node.output)
    return found


def _before_reshapes(graph: Graph, name: str) -> str:
    while (node := graph.producer(name)) is not None and node.op_type in ("Reshape", "Unsqueeze"):
        name = node.input[0]
    return name


def _columns_of_call(graph: Graph, node: onnx.NodeProto, window: str, length: str) -> list[onnx.NodeProto]:
    """x[:, -S:] -> for each sequence, its columns write_at to write_at + S.

    Padding after a sequence's tokens may be outside the window, when the buffers are full; it reads 0.
    """
    name = f"{node.output[0]}."
    zero, one = graph.add_constant("lowered.zero", 0), graph.add_constant("lowered.one", 1)
    axis = graph.add_constant("lowered.axis_1", [1])
    return [
        make_node("Range", [zero, length, one], f"{name}range"),
        make_node("Unsqueeze", [WRITE_AT, axis], f"{name}starts"),
        make_node("Add", [f"{name}starts", f"{name}range"], f"{name}wanted"),
        make_node("Sub", [window, one], f"{name}last"),
        make_node("Min", [f"{name}wanted", f"{name}last"], f"{name}columns"),
        make_node("GatherElements", [node.input[0], f"{name}columns"], f"{name}found", axis=1),
        make_node("Less", [f"{name}wanted", window], f"{name}inside"),
        make_node("Where", [f"{name}inside", f"{name}found", zero], node.output[0]),
    ]


def write_cache_in_place(graph: Graph, task: Task) -> int:
    """Make the cache a buffer of fixed capacity, which TensorRT updates in place.

        past, new -> Concat -> present -> (attention)      becomes
        past, new, write_at -> TensorScatter -> present -> Slice(0 to window) -> (attention)
    and in a step, whose window is the whole buffer,
        past, new, write_at -> TensorScatter -> present -> (attention)

    Why: `present.*` shares the memory of `past_key_values.*`. TensorRT-RTX 1.7.1 makes a copy of what is cut off, in
    every layer; of a whole buffer it makes none in plans of fixed sizes. Where a later visit of a looped model replaces
    K and V in the same cache, a visit attends to a copy with its own: TensorRT updates a cache only once in a call.
    """
    if not task.in_place:
        return 0
    caches = [value.name for value in graph.proto.input if value.name.startswith("past_key_values.")]
    for value in [*graph.proto.input, *graph.proto.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            axis = value.type.tensor_type.shape.dim[2]
            axis.ClearField("dim_param")
            axis.dim_value = task.capacity
    window = "lowered.window"
    concats = [node for node in graph.nodes if node.op_type == "Concat" and node.input[0] in caches]
    live = {
        node.output[0]: f"lowered.live.{node.output[0]}" for node in concats if node.output[0] in graph.output_names
    }
    graph.expect(len(live) == len(caches), "the cache", f"{len(caches)} Concat that append to it", str(len(live)))
    passing = {node.output[0] for node in concats} - live.keys()
    if task.step is None:
        graph.reroute(live)

    def in_place(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        present = node.output[0]
        if present in passing:
            return _copy_with(graph, task, node.input[0], node.input[1], present, window)
        if present not in live:
            return None
        written = make_node("TensorScatter", [*node.input, WRITE_AT], present, axis=2)
        if task.step is not None:
            return [written]
        first, axis = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.axis_2", [2])
        return [written, make_node("Slice", [present, first, window, axis], live[present])]

    count = graph.rewrite(in_place)
    if passing:
        graph.prepend(*_columns_of_own(graph))
    if task.step is None or passing:
        graph.prepend(make_node("Shape", ["attention_mask"], window, start=1, end=2))
    return count


# Of each column of the window: whether a token of the call is there, and which one. Both are [B, 1, window, 1].
_OWN, _TOKEN = "lowered.own_columns", "lowered.own_tokens"


def _columns_of_own(graph: Graph) -> list[onnx.NodeProto]:
    """Nodes that compute `_OWN` and `_TOKEN` from `write_at` and the shapes of the call."""
    zero, one = graph.add_constant("lowered.zero", 0), graph.add_constant("lowered.one", 1)
    rows, others = graph.add_constant("lowered.axis_1", [1]), graph.add_constant("lowered.axes_1_3", [1, 3])
    scalar = graph.add_constant("lowered.no_axes", np.zeros(0, np.int64))
    name = f"{_OWN}."
    return [
        make_node("Shape", ["attention_mask"], f"{name}window_1", start=1, end=2),
        make_node("Reshape", [f"{name}window_1", scalar], f"{name}window"),
        make_node("Shape", ["input_ids"], f"{name}length_1", start=1, end=2),
        make_node("Reshape", [f"{name}length_1", scalar], f"{name}length"),
        make_node("Range", [zero, f"{name}window", one], f"{name}columns"),
        make_node("Unsqueeze", [WRITE_AT, rows], f"{name}starts"),
        make_node("Sub", [f"{name}columns", f"{name}starts"], f"{name}offsets"),
        make_node("GreaterOrEqual", [f"{name}offsets", zero], f"{name}behind"),
        make_node("Less", [f"{name}offsets", f"{name}length"], f"{name}before"),
        make_node("And", [f"{name}behind", f"{name}before"], f"{name}inside"),
        make_node("Unsqueeze", [f"{name}inside", others], _OWN),
        make_node("Where", [f"{name}inside", f"{name}offsets", zero], f"{name}tokens"),
        make_node("Unsqueeze", [f"{name}tokens", others], _TOKEN),
    ]


def _copy_with(graph: Graph, task: Task, past: str, new: str, out: str, window: str) -> list[onnx.NodeProto]:
    """K or V of the window's columns, with those of the call's tokens in their places, as a value of its own."""
    first, axis = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.axis_2", [2])
    shape = task.shape
    sizes = graph.add_constant("lowered.every_channel", [1, shape.num_kv_heads, 1, shape.head_dim])
    return [
        make_node("Expand", [_TOKEN, sizes], f"{out}.tokens"),
        make_node("GatherElements", [new, f"{out}.tokens"], f"{out}.own", axis=2),
        make_node("Slice", [past, first, window, axis], f"{out}.past"),
        make_node("Where", [_OWN, f"{out}.own", f"{out}.past"], out),
    ]


def ask_for_columns(graph: Graph, task: Task) -> int:
    """Pass only the wanted columns of the last state through final norm and head.

        state -> RMSNormalization -> head -> logits      becomes
        state -> Reshape [B x S, H] -> Gather(logits_at [B, M]) -> RMSNormalization -> head -> logits [B, M, V]

    Why: generation needs only the last column, and the head is the largest product of a step.
    """
    if not task.in_place:
        return 0
    norm = graph.expect_producer("logits")
    while norm.op_type != "RMSNormalization":
        graph.expect(norm.input, norm, "a final norm before the head", "none")
        norm = graph.expect_producer(norm.input[0])
    flat = graph.add_constant("lowered.flat_states", [-1, task.shape.hidden_size])
    states, wanted = "lowered.states", "lowered.wanted"
    graph.insert_before(
        norm,
        make_node("Reshape", [norm.input[0], flat], states),
        make_node("Gather", [states, LOGITS_AT], wanted, axis=0),
    )
    graph.set_inputs(norm, [wanted, *norm.input[1:]])
    graph.proto.input.append(helper.make_tensor_value_info(LOGITS_AT, TensorProto.INT64, ["batch", LOGITS_COLUMNS]))
    graph.expect_output("logits").type.tensor_type.shape.dim[1].dim_param = LOGITS_COLUMNS
    return 1


def fix_sizes(graph: Graph, task: Task) -> int:
    """In a step, write the sizes of a call in the places of the names of its axes.

    Why: TensorRT then prepares everything when it builds; nothing is left to compute on the host. Returns: how many
    axes. (Sizes that say which branches run stay open.)
    """
    if task.step is None:
        return 0
    batch, tokens = task.step
    sizes = {"batch": batch, "sequence": tokens, WINDOW: task.capacity, LOGITS_COLUMNS: tokens}
    count = 0
    for value in (*graph.proto.input, *graph.proto.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]
                count += 1
    return count


def report_kept(graph: Graph, task: Task) -> int:
    """Add the output `kept [n]`, the number of rows of every branch that may be skipped, in order; and where scores are
    compared with bounds `kept_by_token [B, S]`, how many of these branches keep each token.

    score, bound (of each choice) -> Concat -> Greater      becomes      kept, kept_by_token
    count (of each choice by rank)      is followed by      Reshape [1] -> Concat -> kept

    One comparison for all branches, since TensorRT would make a kernel of each branch's own.
    """
    choices = branch_choices(graph)
    if not task.in_place or not choices:
        return 0
    outputs: dict[str, list[int | str]] = {KEPT: [len(choices)]}
    if any(choice.op_type == "TopKGather" for choice in choices):
        flat = graph.add_constant("lowered.flat", [-1])
        sizes = [f"lowered.size.{choice.output[2]}" for choice in choices]
        for choice, size in zip(choices, sizes, strict=True):
            graph.append(make_node("Reshape", [choice.output[2], flat], size))
        graph.append(make_node("Concat", sizes, KEPT, axis=0))
    else:
        _compare_all(graph, choices)
        outputs[KEPT_BY_TOKEN] = ["batch", "sequence"]
    for name, shape in outputs.items():
        graph.proto.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    return len(choices)


def _compare_all(graph: Graph, choices: Sequence[onnx.NodeProto]) -> None:
    """Compare the scores of all branches with their bounds, and count: by branch, and by token."""
    first, last = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.axis_1", [1])
    by_row = graph.add_constant("lowered.by_row", [1, -1])
    scores = [f"lowered.score.{number}" for number in range(len(choices))]
    bounds = [f"lowered.bound.{number}" for number in range(len(choices))]
    for choice, score, bound in zip(choices, scores, bounds, strict=True):
        graph.append(
            make_node("Unsqueeze", [choice.input[1], first], score),
            make_node("Reshape", [choice.input[2], by_row], bound),  # one for all rows, or one for each
        )
    graph.append(
        make_node("Concat", scores, "lowered.scores", axis=0),
        make_node("Concat", bounds, "lowered.bounds", axis=0),
        make_node("Greater", ["lowered.scores", "lowered.bounds"], "lowered.keeps"),
        make_node("Cast", ["lowered.keeps"], "lowered.keep_flags", to=TensorProto.INT64),
        make_node("ReduceSum", ["lowered.keep_flags", last], KEPT, keepdims=0),
        make_node("ReduceSum", ["lowered.keep_flags", first], "lowered.kept_of_rows", keepdims=0),
        make_node("Shape", ["input_ids"], "lowered.kept_shape"),
        make_node("Reshape", ["lowered.kept_of_rows", "lowered.kept_shape"], KEPT_BY_TOKEN),
    )


def speak_float32(graph: Graph, task: Task) -> int:
    """Make logits and the exit state float32 outside, whatever the graph's type.

        exit_* -> (the graph) -> logits      becomes      exit_* -> Cast -> (the graph) -> Cast -> logits

    Why: the host has no bfloat16, and with one type for all engines the runner has one code path.
    """
    if not task.in_place or task.float_type == TensorProto.FLOAT:
        return 0
    entering = [value for value in graph.proto.input if _passes_exit(value)]
    leaving = [value for value in graph.proto.output if value.name == "logits" or _passes_exit(value)]
    inside = {value.name: f"lowered.{value.name}" for value in (*entering, *leaving)}
    graph.rename(inside)
    for value in (*entering, *leaving):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    graph.prepend(*(make_node("Cast", [value.name], inside[value.name], to=task.float_type) for value in entering))
    graph.append(*(make_node("Cast", [inside[value.name]], value.name, to=TensorProto.FLOAT) for value in leaving))
    return len(inside)


def _passes_exit(value: onnx.ValueInfoProto) -> bool:
    """Whether a value in the graph's own type passes from `draft` to `verify`."""
    return value.name.startswith("exit_") and value.type.tensor_type.elem_type != TensorProto.FLOAT
