"""K and V in place: the cache is a buffer of fixed capacity that the graph writes into."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from gsx_engines.bundle import tensor_names
from gsx_engines.lowering.for_onnxruntime.task import FIRST, TOKENS_AXIS, TOTAL_LENGTH, WRITE_AT, Task, appended
from gsx_engines.lowering.kv_cache import KINDS, add_channel_scales, add_head_scales, quantize
from gsx_plugins.graph import Graph, make_node

# The shape of K or V of the call's tokens, split into heads.
_HEADS = "lowered.heads"


def write_each_visit(graph: Graph, task: Task) -> int:
    """Where the loops of a looped model share a cache, make what each visit attends to an output.

    Why: every visit writes K and V of the call's tokens to the same places of the one buffer, where attention reads
    them, and the next visit, which needs what attention gave, writes its own there.
    """
    shape = task.shape
    passing = [layer for layer in task.layers if layer not in shape.left_caches]
    for layer in passing:
        for kv in KINDS:
            added = graph.proto.output.add()
            added.CopyFrom(graph.expect_output(tensor_names.present(shape.cache_of(layer), kv)))
            added.name = shape.present_of(layer, kv)
    return len(passing)


def write_in_place(graph: Graph, task: Task) -> int:
    """Under a gate, write K and V of all tokens into the buffer, which attention then only reads.

        past, new -> Concat -> present      becomes      past, new, write_at -> TensorScatter -> appended

    With K and V in 8 bits, `new` passes QuantizeLinear first. `appended` is an output that shares the memory of `past`.
    Why: there are fewer kept rows than tokens, so GroupQueryAttention, which appends as many rows as it has queries,
    cannot append here; and Concat would copy the whole cache.
    """
    if not task.gated:
        return 0
    kv_cache, shape = task.manifest.kv_cache, task.shape
    if kv_cache is not None:
        add_head_scales(graph, kv_cache, task.gated)
    rows = [-1, 1] if task.steps else [1, -1]
    graph.add_constant(_HEADS, [*rows, shape.num_kv_heads, shape.head_dim])
    outputs = {value.name: value for value in graph.proto.output}
    written: dict[str, tuple[int, str]] = {}
    for layer in task.gated:
        for kv in KINDS:
            joined = shape.present_of(layer, kv)
            concat = graph.expect_producer(joined, "Concat")
            split = split_into_heads(graph, concat)
            graph.set_inputs(split, [split.input[0], _HEADS])
            graph.expect(joined in outputs, concat, "its result to be an output", "none of this name")
            added = graph.proto.output.add()
            added.CopyFrom(outputs[joined])
            added.name = appended(layer, kv)
            written[joined] = (layer, kv)

    def in_place(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.output[0] not in written:
            return None
        layer, kv = written[node.output[0]]
        nodes = [] if kv_cache is None else [quantize(node.input[1], layer, kv)]
        new = nodes[0].output[0] if nodes else node.input[1]
        inputs, out = [node.input[0], new, WRITE_AT], [appended(layer, kv)]
        return [*nodes, helper.make_node("TensorScatter", inputs, out, name=node.name, axis=2)]

    return graph.rewrite(in_place)


def forget_loops_before(graph: Graph, task: Task) -> int:
    """Where a branch writes K and V itself, take none of the loop before: they are in the buffer already.

        new K of the loop before -> Transpose, Shape -> (those of skipped tokens)      becomes
        new K of the first loop -> the same, which nothing reads in the end (`run_all_rows`)

    Why: values that leave a branch keep what computes them outside of it.
    """
    if task.manifest.kv_policy != "copy" or not task.writes_in_branch:
        return 0
    shape = task.shape
    first = {shape.cache_of(layer): layer for layer in reversed(task.layers)}
    new = {
        f"layers.{layer}.new_{kv}": f"layers.{first[shape.cache_of(layer)]}.new_{kv}"
        for layer in task.gated
        for kv in KINDS
    }
    count = 0
    for node in list(graph.nodes):
        if node.op_type in ("Transpose", "Shape") and node.input[0] in new:
            graph.set_inputs(node, [new[node.input[0]]])
            count += 1
    return count


def split_into_heads(graph: Graph, concat: onnx.NodeProto) -> onnx.NodeProto:
    """The Reshape that splits K or V into heads: Concat <- Transpose <- Reshape <- all tokens' rows."""
    _, new = graph.expect_inputs(concat, 2)
    transpose = graph.expect_producer(new, "Transpose")
    return graph.expect_producer(transpose.input[0], "Reshape")


def read_live_keys(graph: Graph, task: Task) -> int:
    """Other readers of the keys, which check which tokens have some, read the live part of the written buffer.

    present -> (a reader)      becomes      appended -> Slice(0 to total_length) -> (the reader)
    """
    buffers = {task.shape.present_of(layer, kv): appended(layer, kv) for layer in task.gated for kv in KINDS}
    live = {present: f"lowered.live.{present}" for present in buffers if graph.users(present)}
    for present, name in live.items():
        buffer = buffers[present]
        sliced = make_node("Slice", [buffer, FIRST, TOTAL_LENGTH, TOKENS_AXIS], name)
        graph.insert_after(graph.expect_producer(buffer), sliced)
    graph.reroute(live)
    return len(live)


def name_capacity(graph: Graph, task: Task) -> int:
    """Name a cache's token axis `capacity`, the buffer's fixed length, in inputs and outputs."""
    caches = _caches(graph)
    for value in caches:
        value.type.tensor_type.shape.dim[2].dim_param = "capacity"
    return len(caches)


def store_codes(graph: Graph, task: Task) -> int:
    """For a cache in 8 bits: make its inputs and outputs codes, and give attention a scale for each channel."""
    kv_cache = task.manifest.kv_cache
    if kv_cache is None:
        return 0
    add_channel_scales(graph, kv_cache, task.layers, task.shape.head_dim)
    caches = _caches(graph)
    for value in caches:
        value.type.tensor_type.elem_type = TensorProto.INT8
    return len(caches)


def _caches(graph: Graph) -> list[onnx.ValueInfoProto]:
    """The inputs and outputs that are a cache."""
    names = ("past_key_values.", "present.", "appended.")
    return [value for value in (*graph.proto.input, *graph.proto.output) if value.name.startswith(names)]
