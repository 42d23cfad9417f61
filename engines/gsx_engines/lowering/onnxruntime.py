"""The forms that ONNX Runtime runs best on a CPU: K/V in place, skipped branches not entered.

There are two: some tokens of one sequence, and one token of each of several sequences (a step of a batch).

What changes against the portable graph (all measured, benchmarks/RESULTS.md):

- the cache is a buffer of fixed capacity per layer; this call's K and V are written into it, and nothing is copied,
  since input and outputs are bound to the same memory;
- attention is the contrib op GroupQueryAttention, which reads the buffer up to the current length, where ONNX's
  Attention costs the whole capacity. Attention of all rows appends K and V itself. Under a gate TensorScatter does
  that for all tokens, and the kept rows attend with an empty new key and their rows of the mask, as a bias: the op's
  own mask is causal from the end, which allows at least what a kept row may see;
- K and V may be codes of 8 bits (`kv_cache.py`), which the op reads and writes itself, by a scale for each channel;
- products in 8 bits are the contrib ops that have fast kernels (`quantized.py`);
- the nodes of a branch, and whatever it alone reads, stand inside `If`, which is not entered when no row is kept;
- what is asked at every branch is decided for all branches together as far as it can be (`decisions.py`), and small
  nodes are left out or made one (`trim.py`), since a single step pays for each;
- final norm and head are a model of their own, which runs on the columns that are asked for, in generation the last
  one, and which the two halves of a split decoder share, so that its weights are in memory once.

In a step every row is the last one of its sequence, so the op's own mask by length, and by window, is all there is to
mask. The kept rows' queries stand at their sequences' places; the other sequences attend to one column, and the result
is not read.

Where a skipped token leaves no K and V and must not be seen, the mask is a layer's own, found in the written buffer.

Limits: no padding, float32; in steps no mask of a layer's own, and threshold selection, since rank selection chooses
among a whole call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.bundle.manifest import DecoderShape, Manifest
from gsx_engines.lowering.decisions import decide
from gsx_engines.lowering.kv_cache import add_channel_scales, add_head_scales, hold_codes, of_channels, quantize
from gsx_engines.lowering.nodes import replace_nodes
from gsx_engines.lowering.quantized import fuse_products, weights_inside
from gsx_engines.lowering.regions import branch_choices, find_regions, wrap
from gsx_engines.lowering.trim import (
    add_rows,
    drop_flat_reshapes,
    drop_unread,
    keep_sequence_axis,
    sink,
    spread_columns,
)

CONTRIB = "com.microsoft"
OPSET = 24  # TensorScatter
# Added to the attention score of what a row may not see; exp() of it is 0 in float32.
MASKED = -1e9
# Attributes of GroupQueryAttention over codes.
EIGHT_BITS: dict[str, int | str] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
# A further input of the lowered graph, and its outputs: kept rows by branch (in steps which ones), and the last state.
TOTAL_LENGTH, STATE = "total_length", "state"
# Values inside: where K and V are written, the cache's last column, its length; no new K or V; axis 0.
_WRITE_AT, _LAST, _TOTAL = "lowered.write_at", "lowered.last_column", "lowered.total"
_EMPTY, _FIRST = "lowered.empty", "lowered.first"
# The axis of a cache that counts tokens.
_TOKENS_AXIS = "lowered.tokens_axis"
# The shape of K or V of the call's tokens, split into heads.
_HEADS = "lowered.heads"
# In steps: axis 1; what stands for sequences whose row is not kept; K or V of one token a sequence.
_SECOND, _NO_QUERIES, _NO_COLUMNS = "lowered.second", "lowered.no_queries", "lowered.no_columns"
_EACH_ITS_OWN, _QUERY_OF_EACH = "lowered.each_its_own", "lowered.query_of_each"


def cache_outputs(manifest: Manifest, layer: int, kv: str) -> tuple[str, ...]:
    """Outputs of the lowered graph that must be bound to the memory of a layer's K or V input."""
    present = f"present.{layer}.{kv}"
    return (_appended(layer, kv), present) if gates_attention(manifest, layer) else (present,)


def gates_attention(manifest: Manifest, layer: int) -> bool:
    """Whether a layer's attention runs over kept rows."""
    return (layer, "attn") in manifest.skippable_places


@dataclass(frozen=True)
class Lowered:
    """A graph in two models: the layers, and what comes after them.

    Args:
        body: inputs of the portable graph, but `total_length` [B] int64, the tokens in the cache after the call, in
            place of `attention_mask`: nothing is padded. Cache inputs and outputs have the axis `capacity`;
            `cache_outputs` tells which outputs share the memory of an input. In place of logits it gives `state`
            [B, S, H], of the last layer that it holds, and with gates `kept`: [P] int64, rows by gated branch, or in
            steps [P x B] bool, which ones.
        head: `state` [1, any, H] -> `logits` [1, any, V].
    """

    body: onnx.ModelProto
    head: onnx.ModelProto


def lower(portable: onnx.ModelProto, manifest: Manifest, layers: range, *, steps: bool = False) -> Lowered:
    """A lowered form of a portable graph (its weights stay external).

    Args:
        layers: the ones that the graph holds.
        steps: the form for one token of each of B sequences, in place of S tokens of one.
    """
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    graph = model.graph
    if fuse_products(graph):
        drop_unread(graph)  # or what was replaced would hold its inputs outside of a branch
    head = _cut_head(model, manifest, layers)
    _lengths(graph, manifest.decoder)
    gated = [layer for layer in layers if gates_attention(manifest, layer)]
    if gated:
        _write_in_place(graph, manifest, gated, steps)
        _attend_kept_rows(graph, manifest, steps)
    if len(gated) < len(layers):
        _attend_and_append(graph, manifest, steps)
    _add_biases(graph)
    _name_capacity(graph)
    if manifest.kv_cache is not None:
        add_channel_scales(graph, manifest.kv_cache, layers, manifest.decoder.head_dim)
        hold_codes(graph)
    _regions(graph, manifest, layers)
    indices = [choice.output[1] for choice in branch_choices(graph)]
    decide(graph, manifest.decoder.num_layers, steps=steps)
    add_rows(graph)
    drop_flat_reshapes(graph, indices)
    drop_unread(graph)
    if not steps and not indices:
        keep_sequence_axis(graph, _entering(graph, layers), f"layers.{layers.stop - 1}.output")
    spread_columns(graph)
    _drop_defaults(graph)
    drop_unread(graph)
    sink(graph)
    weights_inside(graph)
    for part in (model, head):
        del part.opset_import[:]
        part.opset_import.extend(
            [helper.make_opsetid("", OPSET), helper.make_opsetid("gsx", 1), helper.make_opsetid(CONTRIB, 1)]
        )
        for function in part.functions:
            function.opset_import[0].version = OPSET
    return Lowered(model, head)


def _appended(layer: int, kv: str) -> str:
    """Under a gate, the cache with this call's K or V written in."""
    return f"appended.{layer}.{kv}"


def _lengths(graph: onnx.GraphProto, shape: DecoderShape) -> None:
    """The lengths that the kernels ask for, from `total_length`, and the masks, which padding has no part in."""
    inputs = [value for value in graph.input if value.name != "attention_mask"]
    del graph.input[:]
    graph.input.extend(inputs)
    graph.input.append(helper.make_tensor_value_info(TOTAL_LENGTH, TensorProto.INT64, ["batch"]))
    constants = {
        "lowered.one.int32": np.array(1, np.int32),
        "lowered.zero": np.array(0, np.int64),
        "lowered.one": np.array(1, np.int64),
        "lowered.beside_rows": np.array([1, 3], np.int64),
        _FIRST: np.array([0], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    ones = numpy_helper.from_array(np.array([1], np.int64))
    nodes = [
        # The new tokens' part of the mask, all that is read of it.
        helper.make_node("Shape", ["input_ids"], ["lowered.new_shape"]),
        helper.make_node("ConstantOfShape", ["lowered.new_shape"], ["attention_mask"], value=ones),
        helper.make_node("Shape", ["input_ids"], ["lowered.batch"], start=0, end=1),
        helper.make_node("ReduceMax", [TOTAL_LENGTH], ["lowered.longest"], keepdims=0),
        helper.make_node("Cast", ["lowered.longest"], [_TOTAL], to=TensorProto.INT32),
        helper.make_node("Cast", [TOTAL_LENGTH], ["lowered.lengths"], to=TensorProto.INT32),
        helper.make_node("Sub", ["lowered.lengths", "lowered.one.int32"], [_LAST]),
        helper.make_node("Shape", ["input_ids"], ["lowered.new_length"], start=1, end=2),
        helper.make_node("Sub", [TOTAL_LENGTH, "lowered.new_length"], [_WRITE_AT]),
        helper.make_node("Range", ["lowered.zero", "lowered.longest", "lowered.one"], ["lowered.columns"]),
        helper.make_node("Unsqueeze", ["position_ids", "lowered.beside_rows"], ["lowered.places"]),
    ]
    for node in graph.node:
        if node.op_type == "Slice" and node.input[0] == "attention_mask":
            node.op_type, node.input[:] = "Identity", ["attention_mask"]  # the new tokens' part is all of it
    masks = [f"mask.{number}" for number in range(len(dict.fromkeys(shape.windows)))]
    for mask, window in zip(masks, dict.fromkeys(shape.windows), strict=True):
        nodes += _mask_nodes(graph, mask, window)
    for node in nodes:
        node.name = node.output[0]
    replace_nodes(graph, [*nodes, *(node for node in graph.node if node.output[0] not in masks)])


def _mask_nodes(graph: onnx.GraphProto, mask: str, window: int | None) -> list[onnx.NodeProto]:
    """Where each row may look, [B, 1, S, T] bool: at its own column and those before it, as far as a window reaches."""
    if window is None:
        return [helper.make_node("LessOrEqual", ["lowered.columns", "lowered.places"], [mask])]
    before, after, outside, size = (f"lowered.{mask}.{name}" for name in ("before", "after", "outside", "window"))
    graph.initializer.append(numpy_helper.from_array(np.array(window, np.int64), size))
    return [
        helper.make_node("LessOrEqual", ["lowered.columns", "lowered.places"], [before]),
        helper.make_node("Sub", ["lowered.places", size], [outside]),
        helper.make_node("Greater", ["lowered.columns", outside], [after]),
        helper.make_node("And", [before, after], [mask]),
    ]


def _write_in_place(graph: onnx.GraphProto, manifest: Manifest, layers: Sequence[int], steps: bool) -> None:
    """present = Concat(past, new) -> appended = TensorScatter(past, new) at the current length."""
    codes: dict[str, onnx.NodeProto] = {}
    if manifest.kv_cache is not None:
        add_head_scales(graph, manifest.kv_cache, layers)
    producers = {node.output[0]: node for node in graph.node}
    outputs = {value.name: value for value in graph.output}
    shape = manifest.decoder
    heads = np.array(
        [-1, 1, shape.num_kv_heads, shape.head_dim] if steps else [1, -1, shape.num_kv_heads, shape.head_dim]
    )
    graph.initializer.append(numpy_helper.from_array(heads, _HEADS))
    for layer in layers:
        for kv in ("key", "value"):
            node = producers[f"present.{layer}.{kv}"]
            assert node.op_type == "Concat", "the cache is appended to by Concat in the portable graph"
            split = producers[producers[node.input[1]].input[0]]
            assert split.op_type == "Reshape", "K and V are split into heads by Reshape in the portable graph"
            split.input[1] = _HEADS
            node.op_type = "TensorScatter"
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", 2))
            node.input.append(_WRITE_AT)
            node.output[0] = _appended(layer, kv)
            if manifest.kv_cache is not None:
                codes[node.output[0]] = quantize(node.input[1], layer, kv)
                node.input[1] = codes[node.output[0]].output[0]
            appended = graph.output.add()
            appended.CopyFrom(outputs[f"present.{layer}.{kv}"])
            appended.name = _appended(layer, kv)
    nodes = [one for node in graph.node for one in (codes.get(node.output[0]), node) if one is not None]
    replace_nodes(graph, nodes)


def _attend_kept_rows(graph: onnx.GraphProto, manifest: Manifest, steps: bool) -> None:
    """GatheredAttention -> GroupQueryAttention with an empty new key over the written cache."""
    shape = manifest.decoder
    _empty_key(graph, shape, steps)
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "GatheredAttention":
            nodes.append(node)
            continue
        layer = int(node.name.split(".")[1])
        name = f"layers.{layer}.lowered."
        rows, index = node.input[:2]
        query, bias, out = name + "query", name + "bias", name + "attended"
        cache = (_appended(layer, "key"), _appended(layer, "value"))
        outputs = [out, f"present.{layer}.key", f"present.{layer}.value"]
        attention = _Attention(manifest, layer, name + "attention")
        if steps:
            at, last, given = name + "at", name + "last_column", name + "given"
            nodes += [
                helper.make_node("Unsqueeze", [index, _SECOND], [at], name=at),
                helper.make_node("Shape", [index], [name + "count"], name=name + "count"),
                helper.make_node("Gather", [_LAST, index], [name + "lasts"], name=name + "lasts", axis=0),
                helper.make_node("ScatterND", [_NO_COLUMNS, at, name + "lasts"], [last], name=last),
                helper.make_node("ScatterND", [_NO_QUERIES, at, rows], [given], name=given),
                helper.make_node("Unsqueeze", [given, _SECOND], [query], name=query),
                attention.node(query, (_EMPTY, _EMPTY), cache, outputs, last=last, windowed=True),
                helper.make_node("Squeeze", [out, _SECOND], [name + "rows"], name=name + "rows"),
                helper.make_node("Gather", [name + "rows", index], [node.output[0]], name=name + "kept", axis=0),
            ]
        else:
            if _is_first_of(producers.get(rows), constants):
                query = producers[rows].input[0]  # they had a first axis before
            else:
                nodes.append(helper.make_node("Unsqueeze", [rows, _FIRST], [query], name=query))
            nodes += [
                helper.make_node("Gather", [_bias_of(node.input[4]), index], [bias], name=bias, axis=2),
                attention.node(query, (_EMPTY, _EMPTY), cache, outputs, bias=bias),
                helper.make_node("Squeeze", [out, _FIRST], [node.output[0]], name=name + "rows"),
            ]
    _read_live_keys(nodes)
    replace_nodes(graph, nodes)


def _is_first_of(node: onnx.NodeProto | None, constants: Mapping[str, TensorProto]) -> bool:
    """Whether a node takes a first axis of one away: Gather(0)."""
    if node is None or node.op_type != "Gather" or any(a.name == "axis" and a.i for a in node.attribute):
        return False
    place = constants.get(node.input[1])
    return place is not None and not place.dims and not numpy_helper.to_array(place).any()


def _read_live_keys(nodes: list[onnx.NodeProto]) -> None:
    """Whatever else looks at the keys, to see which tokens left some, reads the live part of the written buffer."""
    written = {name for node in nodes for name in node.output if name.startswith("appended.")}
    slices: dict[str, onnx.NodeProto] = {}
    for node in nodes:
        for place, name in enumerate(node.input):
            buffer = name.replace("present.", "appended.")
            if name == buffer or buffer not in written:
                continue
            live = f"lowered.live.{name}"
            slices[buffer] = helper.make_node("Slice", [buffer, _FIRST, TOTAL_LENGTH, _TOKENS_AXIS], [live], name=live)
            node.input[place] = live
    for buffer, node in slices.items():
        nodes.insert(1 + next(n for n, writer in enumerate(nodes) if buffer in writer.output), node)


def _empty_key(graph: onnx.GraphProto, shape: DecoderShape, steps: bool) -> None:
    """The new key without tokens; in steps also queries and last columns of sequences that keep nothing."""
    width = shape.num_kv_heads * shape.head_dim
    if not steps:
        graph.initializer.append(numpy_helper.from_array(np.zeros((1, 0, width), np.float32), _EMPTY))
        return
    tails = {
        _EMPTY: (np.array([0, width]), np.float32),
        _NO_QUERIES: (np.array([shape.num_heads * shape.head_dim]), np.float32),
        _NO_COLUMNS: (np.array([], np.int64), np.int32),
    }
    nodes = []
    for name, (tail, dtype) in tails.items():
        graph.initializer.append(numpy_helper.from_array(tail, f"{name}.tail"))
        zero = numpy_helper.from_array(np.zeros(1, dtype))
        nodes += [
            helper.make_node("Concat", ["lowered.batch", f"{name}.tail"], [f"{name}.shape"], axis=0),
            helper.make_node("ConstantOfShape", [f"{name}.shape"], [name], value=zero),
        ]
    for node in nodes:
        node.name = node.output[0]
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), _SECOND))
    first = next(number for number, node in enumerate(graph.node) if node.output[0] == "lowered.batch")
    replace_nodes(graph, [*graph.node[: first + 1], *nodes, *graph.node[first + 1 :]])


def _attend_and_append(graph: onnx.GraphProto, manifest: Manifest, steps: bool) -> None:
    """FullAttention over Concat(past, new) -> GroupQueryAttention that appends the new K and V itself."""
    shape = manifest.decoder
    if steps:
        for value, heads in ((_EACH_ITS_OWN, shape.num_kv_heads), (_QUERY_OF_EACH, shape.num_heads)):
            graph.initializer.append(numpy_helper.from_array(np.array([-1, 1, heads * shape.head_dim]), value))
    producers = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Concat" and node.output[0].startswith("present."):
            continue
        if node.op_type != "FullAttention":
            nodes.append(node)
            continue
        layer = int(node.name.split(".")[1])
        name = f"layers.{layer}.lowered."
        new = []
        for kv in ("key", "value"):
            # Concat <- Transpose <- Reshape <- all tokens' rows, [1, N, width] or [N, width]
            split = producers[producers[producers[f"present.{layer}.{kv}"].input[1]].input[0]]
            assert split.op_type == "Reshape", "K and V are split into heads by Reshape in the portable graph"
            new.append(split.input[0])
        value = name + "value"
        if steps:
            key = name + "key"
            nodes.append(helper.make_node("Reshape", [new[0], _EACH_ITS_OWN], [key], name=key))
            nodes.append(helper.make_node("Reshape", [new[1], _EACH_ITS_OWN], [value], name=value))
        else:
            key = new[0]
            nodes.append(helper.make_node("Unsqueeze", [new[1], _FIRST], [value], name=value))
        split = producers[node.input[0]]
        assert split.op_type == "Reshape", "queries are split into sequences by Reshape in the portable graph"
        query = split.input[0]
        if steps:
            query = name + "query"
            nodes.append(helper.make_node("Reshape", [split.input[0], _QUERY_OF_EACH], [query], name=query))
        past = (f"past_key_values.{layer}.key", f"past_key_values.{layer}.value")
        outputs = [node.output[0], f"present.{layer}.key", f"present.{layer}.value"]
        # The op's own causal mask is the whole mask, unless there is a window.
        bias = "" if steps or shape.windows[layer] is None else _bias_of(node.input[3])
        attention = _Attention(manifest, layer, name + "attention")
        nodes.append(attention.node(query, (key, value), past, outputs, bias=bias, windowed=steps))
    replace_nodes(graph, nodes)


def _bias_of(mask: str) -> str:
    return f"lowered.bias.{mask}"


def _add_biases(graph: onnx.GraphProto) -> None:
    """For every mask [B, 1, S, T] that some attention wants as a float bias, the node that makes it."""
    wanted = {name for node in graph.node for name in node.input if name.startswith(_bias_of(""))}
    graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), _TOKENS_AXIS))
    for name, number in (("lowered.seen", 0.0), ("lowered.masked", MASKED)):
        graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), name))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for mask in node.output:
            bias = _bias_of(mask)
            if bias in wanted:
                inputs = [mask, "lowered.seen", "lowered.masked"]
                nodes.append(helper.make_node("Where", inputs, [bias], name=bias))
    replace_nodes(graph, nodes)


def _entering(graph: onnx.GraphProto, layers: range) -> str:
    """The state that enters the first layer."""
    norm = f"layers.{layers.start}.input_layernorm.weight"
    return next(node.input[0] for node in graph.node if node.op_type == "RMSNormalization" and norm in node.input)


def _name_capacity(graph: onnx.GraphProto) -> None:
    """The axis of tokens of a cache is its capacity, before the call and after it."""
    caches = ("past_key_values.", "present.", "appended.")
    for value in [*graph.input, *graph.output]:
        if value.name.startswith(caches):
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"


@dataclass(frozen=True)
class _Attention:
    """GroupQueryAttention of a layer."""

    manifest: Manifest
    layer: int
    name: str

    def node(
        self,
        query: str,
        new: tuple[str, str],
        cache: tuple[str, str],
        outputs: list[str],
        *,
        last: str = _LAST,
        bias: str = "",
        windowed: bool = False,
    ) -> onnx.NodeProto:
        """Of queries [B, K, heads x D] over a cache, to which new K and V are appended.

        Args:
            last: the last column that each sequence sees, [B] int32.
            bias: added to the scores, where the op's own mask is not enough.
            windowed: whether the op's own mask has the layer's window.
        """
        shape = self.manifest.decoder
        inputs = [query, *new, *cache, last, _TOTAL, "", "", "", bias]
        attributes: dict[str, int | str] = {"num_heads": shape.num_heads, "kv_num_heads": shape.num_kv_heads}
        if self.manifest.kv_cache is not None:
            inputs += ["", of_channels(self.layer, "key"), of_channels(self.layer, "value")]
            attributes |= EIGHT_BITS
        while not inputs[-1]:
            inputs.pop()
        window = shape.windows[self.layer]
        if windowed and window is not None:
            attributes["local_window_size"] = window
        return helper.make_node("GroupQueryAttention", inputs, outputs, name=self.name, domain=CONTRIB, **attributes)


def _regions(graph: onnx.GraphProto, manifest: Manifest, layers: range) -> None:
    """Each branch's nodes into an `If`."""
    # What the cache was before. Under the K/V policy `none` what is written into it belongs to the branch.
    before = {}
    for layer in layers:
        for kv in ("key", "value"):
            before[f"present.{layer}.{kv}"] = _appended(layer, kv)
            # Where others look for a token's key, a skipped one writes zeros over what a draft may have left there.
            if manifest.kv_policy == "none" and not manifest.hides_skipped:
                before[_appended(layer, kv)] = f"past_key_values.{layer}.{kv}"
    regions = find_regions(graph, before)
    cache_type = TensorProto.FLOAT if manifest.kv_cache is None else TensorProto.INT8
    nodes: list[onnx.NodeProto] = []
    ends = {region.last.output[0]: region for region in regions}
    member_names = {node.name for region in regions for node in (*region.nodes, region.add, *region.after)}
    for node in graph.node:
        region = ends.get(node.output[0])
        if region is not None:
            written = [name for member in region.nodes for name in member.output if name in before]
            inside = {name: before[name] for name in written}
            carried = [(name, inside.get(fallback, fallback)) for name, fallback in inside.items()]
            nodes.append(wrap(region, carried, f"{region.choice.output[2]}.", cache_type))
        elif node.name not in member_names:
            nodes.append(node)
    replace_nodes(graph, nodes)


def _cut_head(model: onnx.ModelProto, manifest: Manifest, layers: range) -> onnx.ModelProto:
    """Take final norm and head out of a graph, which then gives the state that they read. Returns: their model."""
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    reads = {name for node in graph.node for name in node.input}
    # The states that are given: the one that leaves the last layer, [N, H], is shaped [1, S, H] for the head.
    last = f"layers.{layers.stop - 1}.output"
    shaped = next(
        n.output[0] for n in graph.node if n.input[:1] == [last] and n.op_type == "Reshape" and n.output[0] in reads
    )
    head = onnx.ModelProto()
    head.CopyFrom(model)
    logits = outputs["logits"]
    state = helper.make_tensor_value_info(STATE, TensorProto.FLOAT, [1, "columns", manifest.decoder.hidden_size])
    for value, axis in ((logits, "columns"), (state, "columns")):
        value.type.tensor_type.shape.dim[1].dim_param = axis
    for node in head.graph.node:
        node.input[:] = [STATE if name == shaped else name for name in node.input]
    _set_values(head.graph.input, [state])
    _set_values(head.graph.output, [logits])
    drop_unread(head.graph)
    kept = [value for name, value in outputs.items() if name not in ("logits", "exit_hidden")]
    leaving = helper.make_tensor_value_info(STATE, TensorProto.FLOAT, ["batch", "sequence", None])
    _set_values(graph.output, [*kept, leaving])
    graph.node.append(helper.make_node("Identity", [shaped], [STATE], name=STATE))
    return head


def _set_values(field: Any, values: Sequence[onnx.ValueInfoProto]) -> None:
    copies = []
    for value in values:
        copy = onnx.ValueInfoProto()
        copy.CopyFrom(value)
        copies.append(copy)
    del field[:]
    field.extend(copies)


def _drop_defaults(graph: onnx.GraphProto) -> None:
    """Inputs with a default value become plain inputs: only those can be bound to memory."""
    inputs = {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in inputs]
    del graph.initializer[:]
    graph.initializer.extend(kept)
