"""Attention as the contrib op GroupQueryAttention, which reads the buffer up to the current length."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gsx_engines.lowering.for_onnxruntime.cache import split_into_heads
from gsx_engines.lowering.for_onnxruntime.task import (
    FIRST,
    LAST,
    MASKED,
    TOKENS_AXIS,
    Task,
    appended,
    attention_node,
    bias_of,
    layer_of,
)
from gsx_engines.lowering.kv_cache import KINDS
from gsx_plugins.graph import Graph, attribute, make_node

# An empty new K or V. In steps also: axis 1, and the fillers for sequences whose row is not kept.
_EMPTY, _SECOND = "lowered.empty", "lowered.second"
_NO_QUERIES, _NO_COLUMNS = "lowered.no_queries", "lowered.no_columns"
# In steps, the shapes of K or V of one token per sequence, and of its queries.
_EACH_ITS_OWN, _QUERY_OF_EACH = "lowered.each_its_own", "lowered.query_of_each"


def attend_kept_rows(graph: Graph, task: Task) -> int:
    """Let attention of the kept rows of one sequence read the written buffer, with an empty new key.

        rows, index, key, value, mask -> GatheredAttention -> out      becomes
        rows [1, K, H], no key, no value, appended, bias[:, :, index] -> GroupQueryAttention -> Squeeze -> out

    Why: ONNX's Attention costs the whole capacity. The op's own mask is causal from the end, which allows at least what
    a kept row may see; the rows of the mask, as a bias, hide the rest.
    """
    if task.steps or not task.gated:
        return 0
    width = task.shape.num_kv_heads * task.shape.head_dim
    graph.add_constant(_EMPTY, np.zeros((1, 0, width), np.float32))

    def attend(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "GatheredAttention":
            return None
        layer = layer_of(graph, node)
        name = f"layers.{layer}.lowered."
        rows, index, _, _, mask = graph.expect_inputs(node, 5)
        query, bias, out = name + "query", name + "bias", name + "attended"
        cache = (appended(layer, "key"), appended(layer, "value"))
        outputs = [out, *(task.shape.present_of(layer, kv) for kv in KINDS)]
        nodes = []
        of_first = graph.producer(rows)
        if of_first is not None and _takes_first(graph, of_first):
            query = of_first.input[0]  # the rows had a first axis before
        else:
            nodes.append(make_node("Unsqueeze", [rows, FIRST], query))
        return [
            *nodes,
            make_node("Gather", [bias_of(mask), index], bias, axis=2),
            attention_node(graph, task, node, query, (_EMPTY, _EMPTY), cache, outputs, bias=bias),
            helper.make_node("Squeeze", [out, FIRST], [node.output[0]], name=name + "rows"),
        ]

    return graph.rewrite(attend)


def attend_kept_rows_of_steps(graph: Graph, task: Task) -> int:
    """The same for one token of each of several sequences: each sequence has a position, and reads its own row.

        rows, index, .. -> GatheredAttention -> out      becomes
        rows -> ScatterND at index (zeros elsewhere) -> [B, 1, H] -> GroupQueryAttention -> Gather(index) -> out

    Every row is the last one of its sequence, so the op's mask by length, and by window, is the whole mask. A sequence
    that is not kept attends to one column, and the result is not read.
    """
    if not task.steps or not task.gated:
        return 0
    _add_fillers(graph, task)

    def attend(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "GatheredAttention":
            return None
        layer = layer_of(graph, node)
        name = f"layers.{layer}.lowered."
        rows, index, *_ = graph.expect_inputs(node, 5)
        query, out, at, last, given = (name + end for end in ("query", "attended", "at", "last_column", "given"))
        cache = (appended(layer, "key"), appended(layer, "value"))
        outputs = [out, *(task.shape.present_of(layer, kv) for kv in KINDS)]
        return [
            make_node("Unsqueeze", [index, _SECOND], at),
            make_node("Gather", [LAST, index], name + "lasts", axis=0),
            make_node("ScatterND", [_NO_COLUMNS, at, name + "lasts"], last),
            make_node("ScatterND", [_NO_QUERIES, at, rows], given),
            make_node("Unsqueeze", [given, _SECOND], query),
            attention_node(graph, task, node, query, (_EMPTY, _EMPTY), cache, outputs, last=last),
            make_node("Squeeze", [out, _SECOND], name + "rows"),
            helper.make_node("Gather", [name + "rows", index], [node.output[0]], name=name + "kept", axis=0),
        ]

    return graph.rewrite(attend)


def _takes_first(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node removes a first axis of length 1: Gather(0)."""
    if node.op_type != "Gather" or attribute(node, "axis"):
        return False
    place = graph.constants.get(node.input[1])
    return place is not None and not place.dims and graph.number(node.input[1]) == 0


def _add_fillers(graph: Graph, task: Task) -> None:
    """Add an empty new key, and queries and last columns for sequences that keep nothing, for the call's batch size."""
    shape = task.shape
    tails = {
        _EMPTY: (np.array([0, shape.num_kv_heads * shape.head_dim]), np.float32),
        _NO_QUERIES: (np.array([shape.num_heads * shape.head_dim]), np.float32),
        _NO_COLUMNS: (np.array([], np.int64), np.int32),
    }
    nodes = []
    for name, (tail, dtype) in tails.items():
        rest = graph.add_constant(f"{name}.tail", tail)
        zero = numpy_helper.from_array(np.zeros(1, dtype))
        nodes.append(make_node("Concat", ["lowered.batch", rest], f"{name}.shape", axis=0))
        nodes.append(make_node("ConstantOfShape", [f"{name}.shape"], name, value=zero))
    graph.add_constant(_SECOND, [1])
    graph.insert_after(graph.expect_producer("lowered.batch"), *nodes)


def attend_and_append(graph: Graph, task: Task) -> int:
    """Let attention over all rows append K and V itself.

        past, new -> Concat -> present; query, present, mask -> FullAttention -> out      becomes
        query, new, past, length -> GroupQueryAttention -> out, present

    Why: one op instead of two, and nothing is copied. The op's own mask, causal and by the layer's window, is the whole
    mask: it leaves out what a bias would only hide.
    """
    shape = task.shape
    if len(task.gated) == len(task.layers):
        return 0
    if task.steps:
        graph.add_constant(_EACH_ITS_OWN, [-1, 1, shape.num_kv_heads * shape.head_dim])
        graph.add_constant(_QUERY_OF_EACH, [-1, 1, shape.num_heads * shape.head_dim])

    def attend(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "Concat" and node.output[0].startswith("present."):
            return []
        if node.op_type != "FullAttention":
            return None
        layer = layer_of(graph, node)
        name = f"layers.{layer}.lowered."
        concats = [graph.expect_producer(shape.present_of(layer, kv), "Concat") for kv in KINDS]
        new_key, new_value = (split_into_heads(graph, concat).input[0] for concat in concats)
        query, value = graph.expect_producer(node.input[0], "Reshape").input[0], name + "value"
        nodes = []
        if task.steps:
            key, query_of_each = name + "key", name + "query"
            nodes.append(make_node("Reshape", [new_key, _EACH_ITS_OWN], key))
            nodes.append(make_node("Reshape", [new_value, _EACH_ITS_OWN], value))
            nodes.append(make_node("Reshape", [query, _QUERY_OF_EACH], query_of_each))
            query = query_of_each
        else:
            key = new_key
            nodes.append(make_node("Unsqueeze", [new_value, FIRST], value))
        past = (shape.past_of(layer, "key"), shape.past_of(layer, "value"))
        outputs = [node.output[0], *(task.shape.present_of(layer, kv) for kv in KINDS)]
        return [*nodes, attention_node(graph, task, node, query, (key, value), past, outputs)]

    count = sum(node.op_type == "FullAttention" for node in graph.nodes)
    graph.rewrite(attend)
    return count


def add_biases(graph: Graph, task: Task) -> int:
    """Add a node that makes the float bias of every mask [B, 1, S, T] that some attention reads as a bias.

    mask (bool)      is joined by      mask -> Where(0, -1e9) -> bias
    """
    graph.add_constant(TOKENS_AXIS, [2])
    seen = graph.add_constant("lowered.seen", np.float32(0))
    masked = graph.add_constant("lowered.masked", np.float32(MASKED))

    def with_bias(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        biases = [make_node("Where", [mask, seen, masked], bias_of(mask)) for mask in node.output if mask in wanted]
        return [node, *biases] if biases else None

    start = len(bias_of(""))
    read = {name for node in graph.nodes for name in node.input}
    wanted = {name[start:] for name in read if name.startswith(bias_of(""))}
    return graph.rewrite(with_bias)
