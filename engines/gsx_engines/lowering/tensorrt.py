"""The form of a graph that TensorRT builds an engine from. The file in the bundle stays as it is.

With K and V in place, which is what gsx runs, this changes against the portable graph:

- the cache is a buffer of fixed capacity per layer. `TensorScatter` writes this call's K and V into it, which TensorRT
  imports as its in-place cache update: `present.*` shares the memory of `past_key_values.*`, and nothing is copied;
- the axis `total` becomes `window`: how many columns of the cache attention reads, at least those that are filled;
  columns behind are 0 in `attention_mask`. Where the call's tokens stand is an input of its own, `write_at [B]`, for
  each sequence. So sequences have lengths of their own without padding, a step of decoding keeps its shapes while the
  cache grows, and one CUDA graph serves many steps;
- the head runs on the tokens that `logits_at [B, M]` names, numbered over the flattened batch;
- `logits` and what passes an exit (`exit_hidden`, `exit_key`, `exit_value`) are float32 outside in every precision;
- `kept [n]` tells how many rows each gated branch ran on;
- `thresholds` and `budget` lose their default value, so that they stay inputs;
- attention is written out for TensorRT's `Attention` (one output, explicit mask);
- codes of an embedding or a gate go through a DequantizeLinear, that of an embedding before its rows are read:
  TensorRT takes 8-bit constants nowhere else;
- an op without a plugin is rewritten; see `Form`.

With K and V that grow, for other people's programs, only the last three and the lost default are done: the engine has
the portable graph's inputs and outputs, `past_key_values.*` and `present.*` with the call's columns behind it.

Without a plugin for `ThresholdGather` the selection becomes a mask: every row goes through every branch, and a skipped
row takes the residual as it was. The results are the same and nothing is saved. `TopKGather` has a body that TensorRT
imports when `k [1]` is known to the host: it becomes an input in place of `budget`, which the runner counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.bundle.engine_entry import KvLayout
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering.nodes import replace_nodes
from gsx_engines.lowering.regions import CHOICES, branch_choices
from gsx_plugins.domain import DOMAIN

OPSET = 24  # TensorScatter
# TensorRT's TopK takes at most so many.
MAX_TOPK = 3840
# What became of an op of domain gsx in an engine: a plugin; its function body; standard ops that run on the kept
# rows alone; standard ops that run on all rows (right, and nothing is saved).
Form = Literal["plugin", "body", "rows", "mask", "all"]
# Inputs of the lowered graph that the portable one has not, and its output of kept rows by branch.
WRITE_AT, LOGITS_AT, K, KEPT = "write_at", "logits_at", "k", "kept"
# Names of dynamic axes.
WINDOW, LOGITS_COLUMNS = "window", "logits_columns"
FLOAT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Lowered:
    """A graph for TensorRT.

    Args:
        model: its weights stay external, in the bundle's file.
        forms: what became of each op of domain gsx that the portable graph has.
    """

    model: onnx.ModelProto
    forms: Mapping[str, Form]


def lower(
    portable: onnx.ModelProto,
    manifest: Manifest,
    *,
    capacity: int,
    rows: int,
    plugins: Collection[str],
    one_sequence: bool,
    kv_layout: KvLayout = "in-place",
) -> Lowered:
    """The form of a graph of a bundle that TensorRT builds an engine from.

    Args:
        portable: `model.onnx`, `draft.onnx` or `verify.onnx`, without its weights.
        capacity: columns of the K/V buffers, fixed in the engine; nothing to K and V that grow.
        rows: the most tokens of a call, over all sequences.
        plugins: ops of domain gsx that a plugin stands for.
        one_sequence: the batch is 1 always, so that kept rows attend alone, without their neighbours' places.
        kv_layout: whether K and V are written in place.
    """
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    rewriter = _Rewriter(model, manifest, frozenset(plugins), rows, one_sequence)
    rewriter.drop_defaults()
    if kv_layout == "in-place":
        rewriter.place_call()
        rewriter.write_cache_in_place(capacity)
        rewriter.ask_for_columns()
        rewriter.report_kept()
    rewriter.rewrite_ops()
    rewriter.dequantize_constants()
    if kv_layout == "in-place":
        rewriter.speak_float32()
    rewriter.finish()
    return Lowered(model, rewriter.forms)


class _Rewriter:
    """The rewriting of one graph; each method is one change, and they run in the order of `lower`."""

    def __init__(
        self, model: onnx.ModelProto, manifest: Manifest, plugins: frozenset[str], rows: int, one_sequence: bool
    ) -> None:
        self.model, self.graph, self.shape = model, model.graph, manifest.decoder
        self.width = self.shape.num_heads * self.shape.head_dim
        self.float_type = FLOAT_TYPES[manifest.precision]
        self.plugins, self.rows, self.one_sequence = plugins, rows, one_sequence
        self.forms: dict[str, Form] = {}
        self.constants: dict[str, np.ndarray] = {}

    # -- what a caller sees ------------------------------------------------------------------------------------

    def drop_defaults(self) -> None:
        """An initializer of an input's name would make a constant of the input."""
        inputs = {value.name for value in self.graph.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name not in inputs]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def place_call(self) -> None:
        """The call's tokens stand at `write_at`, where the portable graph has them in the last columns of the mask."""
        total = self._sizes_of("attention_mask")
        length = self._sizes_of("input_ids")
        nodes, offsets = [], {}
        for node in self.graph.node:
            if node.op_type == "Sub" and node.input[0] in total and node.input[1] in length:
                offsets[node.output[0]] = (node.input[0], node.input[1])
                by_sequence = self._constant("lowered.by_sequence", [-1, 1, 1])  # meets rows [S, 1], columns [W]
                node = _node("Reshape", [WRITE_AT, by_sequence], node.output[0])
            elif node.op_type == "Slice" and (offset := self._behind_reshapes(node.input[1])) in offsets:
                nodes += self._columns_of_call(node, *offsets[offset])
                continue
            nodes.append(node)
        assert offsets, "the place of the call is the mask's length less the call's"
        replace_nodes(self.graph, nodes)
        self._input(WRITE_AT, TensorProto.INT64, ["batch"])
        for value in self.graph.input:
            if value.name == "attention_mask":
                value.type.tensor_type.shape.dim[1].dim_param = WINDOW

    def write_cache_in_place(self, capacity: int) -> None:
        """present = Concat(past, new) -> present = TensorScatter(past, new, write_at), read up to `window`."""
        caches = [value.name for value in self.graph.input if value.name.startswith("past_key_values.")]
        for value in [*self.graph.input, *self.graph.output]:
            if value.name.startswith(("past_key_values.", "present.")):
                value.type.tensor_type.shape.dim[2].ClearField("dim_param")
                value.type.tensor_type.shape.dim[2].dim_value = capacity
        window = "lowered.window"
        nodes = [_node("Shape", ["attention_mask"], window, start=1, end=2)]
        live: dict[str, str] = {}
        for node in self.graph.node:
            if node.op_type == "Concat" and node.input[0] in caches:
                present = node.output[0]
                live[present] = f"lowered.live.{present}"
                first, axis = self._constant("lowered.first", [0]), self._constant("lowered.axis_2", [2])
                nodes += [
                    _node("TensorScatter", [*node.input, WRITE_AT], present, axis=2),
                    _node("Slice", [present, first, window, axis], live[present]),
                ]
                continue
            node.input[:] = [live.get(name, name) for name in node.input]
            nodes.append(node)
        assert len(live) == len(caches), "the cache is appended to by Concat in the portable graph"
        replace_nodes(self.graph, nodes)

    def ask_for_columns(self) -> None:
        """Only the wanted columns of the last state go through the final norm and the head."""
        producers = {name: node for node in self.graph.node for name in node.output}
        norm = producers["logits"]
        while norm.op_type != "RMSNormalization":
            norm = producers[norm.input[0]]
        state, wanted = norm.input[0], "lowered.wanted"
        flat = self._constant("lowered.flat_states", [-1, self.shape.hidden_size])
        place = next(n for n, node in enumerate(self.graph.node) if node.output[0] == norm.output[0])
        self.graph.node[place].input[0] = wanted
        self.graph.node.insert(place, _node("Gather", ["lowered.states", LOGITS_AT], wanted, axis=0))
        self.graph.node.insert(place, _node("Reshape", [state, flat], "lowered.states"))
        self._input(LOGITS_AT, TensorProto.INT64, ["batch", LOGITS_COLUMNS])
        for value in self.graph.output:
            if value.name == "logits":
                value.type.tensor_type.shape.dim[1].dim_param = LOGITS_COLUMNS

    def dequantize_constants(self) -> None:
        """Gather(codes) x Gather(scales) -> Gather(DequantizeLinear(codes, scales)); Cast(codes) x scales likewise."""
        producers = {name: node for node in self.graph.node for name in node.output}
        codes = {tensor.name for tensor in self.graph.initializer if tensor.data_type == TensorProto.INT8}
        nodes = []
        for node in self.graph.node:
            floats = producers.get(node.input[0]) if node.op_type == "Mul" else None
            if floats and floats.op_type == "Cast" and floats.input[0] in codes:
                nodes.append(_node("DequantizeLinear", [floats.input[0], node.input[1]], node.output[0], axis=1))
                continue
            rows = producers.get(floats.input[0]) if floats and floats.op_type == "DequantizeLinear" else None
            if rows is None or rows.op_type != "Gather":
                nodes.append(node)
                continue
            table, ids = rows.input
            scales = producers[producers[node.input[1]].input[0]].input[0]
            whole = f"lowered.{table}"
            nodes += [
                _node("DequantizeLinear", [table, scales], whole, axis=0),
                _node("Gather", [whole, ids], node.output[0], axis=0),
            ]
        replace_nodes(self.graph, nodes)

    def speak_float32(self) -> None:
        """Logits and what passes an exit go to and come from the host, which knows no bfloat16."""
        if self.float_type == TensorProto.FLOAT:
            return
        entering = [value for value in self.graph.input if _passes_exit(value)]
        leaving = [value for value in self.graph.output if value.name == "logits" or _passes_exit(value)]
        inside = {value.name: f"lowered.{value.name}" for value in (*entering, *leaving)}
        for node in self.graph.node:
            node.input[:] = [inside.get(name, name) for name in node.input]
            node.output[:] = [inside.get(name, name) for name in node.output]
        for value in (*entering, *leaving):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        before = [_node("Cast", [value.name], inside[value.name], to=self.float_type) for value in entering]
        after = [_node("Cast", [inside[value.name]], value.name, to=TensorProto.FLOAT) for value in leaving]
        replace_nodes(self.graph, [*before, *self.graph.node, *after])

    def report_kept(self) -> None:
        """One output with the number of rows of every gated branch, in order."""
        flat = self._constant("lowered.flat", [-1])
        sizes = []
        for choice in branch_choices(self.graph):
            sizes.append(f"lowered.size.{choice.output[2]}")
            self.graph.node.append(_node("Reshape", [choice.output[2], flat], sizes[-1]))
        if sizes:
            self.graph.node.append(_node("Concat", sizes, KEPT, axis=0))
            self.graph.output.append(helper.make_tensor_value_info(KEPT, TensorProto.INT64, [len(sizes)]))

    # -- the ops of domain gsx ---------------------------------------------------------------------------------

    def rewrite_ops(self) -> None:
        """Every op of domain gsx in the form that this engine can have."""
        nodes: list[onnx.NodeProto] = []
        masks: dict[str, str] = {}  # index of a choice that became a mask -> which rows are kept, [N, 1] bool
        same: dict[str, str] = {}  # value -> the one that it equals, now that every row is there
        for node in self.graph.node:
            node.input[:] = [same.get(name, name) for name in node.input]
            op = node.op_type
            if op in CHOICES:
                form = self.forms[op] = self._form_of_choice(op)
                if form == "mask":
                    rows, index, _ = node.output
                    same[rows], masks[index] = node.input[0], _mask_name(index)
                nodes += self._mask(node) if form == "mask" else [node]
            elif op in ("Reshape", "Unsqueeze") and node.input[0] in masks:
                masks[node.output[0]] = masks[node.input[0]]
            elif op == "Gather" and node.input[1] in masks:
                same[node.output[0]] = node.input[0]
            elif op == "ScatterND" and node.input[1] in masks:
                below, index, rows = node.input
                nodes.append(_node("Where", [masks[index], rows, below], node.output[0]))
            elif op == "GatedScatterAdd":
                kept = masks.get(node.input[3])
                self.forms[op] = "mask" if kept else "plugin" if op in self.plugins else "body"
                nodes += self._add_where(node, kept) if kept else [node]
            elif op == "GatheredAttention":
                nodes += self._gathered_attention(node, node.input[1] in masks)
            elif op == "FullAttention":
                self.forms[op] = "all"
                nodes += self._attention(node.input, node.output[0], f"{node.name}.")
            elif op == "RotaryEmbedding":
                nodes += self._rotary(node)
            else:
                nodes.append(node)
        replace_nodes(self.graph, nodes)
        if self.forms.get("TopKGather") == "body":
            self._count_on_host()

    def _form_of_choice(self, op: str) -> Form:
        if op in self.plugins:
            return "plugin"
        return "body" if op == "TopKGather" and self.rows <= MAX_TOPK else "mask"

    def _count_on_host(self) -> None:
        """`k [1]` comes from the caller, in place of `budget`: TensorRT's TopK reads it before the call runs."""
        replace_nodes(self.graph, [node for node in self.graph.node if K not in node.output])
        inputs = [value for value in self.graph.input if value.name != "budget"]
        del self.graph.input[:]
        self.graph.input.extend(inputs)
        self._input(K, TensorProto.INT64, [1])

    def _mask(self, choice: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Which rows a choice keeps, [N, 1] bool, and how many."""
        _, score, bound = choice.input
        _, index, count = choice.output
        kept, flags, column = f"{index}.kept", f"{index}.flags", _mask_name(index)
        last = self._constant("lowered.flat", [-1])
        if choice.op_type == "ThresholdGather":
            nodes = [_node("Greater", [score, bound], kept)]
        else:
            nodes = self._best(score, bound, kept)
        return [
            *nodes,
            _node("Unsqueeze", [kept, last], column),
            _node("Cast", [kept], flags, to=TensorProto.INT64),
            _node("ReduceSum", [flags], count, keepdims=0),
        ]

    def _best(self, score: str, k: str, kept: str) -> list[onnx.NodeProto]:
        """The k best scores as a mask: those with fewer than k better ones. N x N comparisons.

        TensorRT's TopK needs k on the host and at most 3,840; here it is a value of the graph. Ties and NaN are
        TopKGather's: the earlier row wins, and NaN counts as the lowest finite score.
        """
        name = f"{kept}."
        lowest = self._constant("lowered.lowest", np.float32(np.finfo(np.float32).min))
        zero, one = self._constant("lowered.zero", 0), self._constant("lowered.one", 1)
        row, column = self._constant("lowered.first", [0]), self._constant("lowered.axis_1", [1])

        def node(op: str, inputs: list[str], out: str, **attributes: int) -> onnx.NodeProto:
            return _node(op, inputs, name + out, **attributes)

        nodes = [
            node("IsNaN", [score], "nan"),
            _node("Where", [name + "nan", lowest, score], name + "ranked"),
            node("Shape", [score], "tokens"),
            node("Squeeze", [name + "tokens"], "token_count"),
            node("Range", [zero, name + "token_count", one], "places"),
            # rows: the token itself; columns: the others
            node("Unsqueeze", [name + "ranked", column], "own"),
            node("Unsqueeze", [name + "ranked", row], "other"),
            node("Unsqueeze", [name + "places", column], "own_place"),
            node("Unsqueeze", [name + "places", row], "other_place"),
            node("Greater", [name + "other", name + "own"], "higher"),
            node("Equal", [name + "other", name + "own"], "equal"),
            node("Less", [name + "other_place", name + "own_place"], "earlier"),
            node("And", [name + "equal", name + "earlier"], "wins_tie"),
            node("Or", [name + "higher", name + "wins_tie"], "better"),
            node("Cast", [name + "better"], "better_flags", to=TensorProto.INT64),
            node("ReduceSum", [name + "better_flags", column], "better_count", keepdims=0),
        ]
        return [*nodes, _node("Less", [name + "better_count", k], kept)]

    def _add_where(self, node: onnx.NodeProto, kept: str) -> list[onnx.NodeProto]:
        """GatedScatterAdd over all rows: where a row is skipped, the residual as it was."""
        residual, rows, gate, _ = node.input
        gated, added = f"{node.output[0]}.gated", f"{node.output[0]}.added"
        return [
            _node("Mul", [gate, rows], gated),
            _node("Add", [residual, gated], added),
            _node("Where", [kept, added, residual], node.output[0]),
        ]

    def _gathered_attention(self, node: onnx.NodeProto, every_row: bool) -> list[onnx.NodeProto]:
        """Attention of the kept rows alone where there is one sequence; else of all rows, each in its place."""
        query, index, key, value, mask = node.input
        name, out = f"{node.name}.", node.output[0]
        if self.one_sequence and not every_row:
            self.forms[node.op_type] = "rows"
            first = self._constant("lowered.first", [0])
            return [
                _node("Gather", [mask, index], f"{name}mask", axis=2),
                _node("Unsqueeze", [query, first], f"{name}query"),
                *self._attention([f"{name}query", key, value, f"{name}mask"], f"{name}attended", name),
                _node("Squeeze", [f"{name}attended", first], out),
            ]
        self.forms[node.op_type] = "all"
        flat = self._constant("lowered.flat_rows", [-1, self.width])
        nodes, rows = [], query
        if not every_row:
            tokens, zeros = f"{name}tokens", np.zeros(1, helper.tensor_dtype_to_np_dtype(self.float_type))
            nodes = [
                _node("Shape", ["input_ids"], f"{name}call"),
                _node("ReduceProd", [f"{name}call"], tokens, keepdims=1),
                _node("Concat", [tokens, self._constant("lowered.width", [self.width])], f"{name}flat_shape", axis=0),
                _node("Expand", [self._constant("lowered.empty", zeros), f"{name}flat_shape"], f"{name}empty"),
                _node("Unsqueeze", [index, self._constant("lowered.last", [-1])], f"{name}place"),
                _node("ScatterND", [f"{name}empty", f"{name}place", query], f"{name}full"),
            ]
            rows = f"{name}full"
        nodes += [
            _node("Shape", ["input_ids"], f"{name}outer"),
            _node("Concat", [f"{name}outer", self._constant("lowered.width", [self.width])], f"{name}shape", axis=0),
            _node("Reshape", [rows, f"{name}shape"], f"{name}by_sequence"),
            *self._attention([f"{name}by_sequence", key, value, mask], f"{name}attended", name),
        ]
        if every_row:
            return [*nodes, _node("Reshape", [f"{name}attended", flat], out)]
        return [
            *nodes,
            _node("Reshape", [f"{name}attended", flat], f"{name}every"),
            _node("Gather", [f"{name}every", index], out, axis=0),
        ]

    def _attention(self, inputs: Sequence[str], out: str, name: str) -> list[onnx.NodeProto]:
        """query [B, S, heads x D], key and value [B, kv heads, window, D], mask [B, 1, S, window] -> as query.

        The sizes are written as "copy that axis" and numbers, never as -1: S may be a number of kept rows, and 0.
        """
        query, key, value, mask = inputs
        heads = self.shape.num_heads
        apart = self._constant(f"lowered.apart_{heads}", [0, 0, heads, self.shape.head_dim])
        together = self._constant(f"lowered.together_{heads}", [0, 0, self.width])
        # Without a fused kernel (float32, some counts of kept rows) the build fails, unless TensorRT may take it apart.
        return [
            _node("Reshape", [query, apart], f"{name}apart"),
            _node("Transpose", [f"{name}apart"], f"{name}heads", perm=[0, 2, 1, 3]),
            _node("Attention", [f"{name}heads", key, value, mask], f"{name}attention", TRT_decomposable=1),
            _node("Transpose", [f"{name}attention"], f"{name}tokens_first", perm=[0, 2, 1, 3]),
            _node("Reshape", [f"{name}tokens_first", together], out),
        ]

    def _rotary(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The same over [1, heads, S, D]: TensorRT splits the heads off with a -1, which no row at all leaves open."""
        heads = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
        name, width = f"{node.name}.", self.shape.head_dim
        apart = self._constant(f"lowered.apart_{heads}", [0, 0, heads, width])
        together = self._constant(f"lowered.together_{heads}", [0, 0, heads * width])
        return [
            _node("Reshape", [node.input[0], apart], f"{name}apart"),
            _node("Transpose", [f"{name}apart"], f"{name}heads", perm=[0, 2, 1, 3]),
            _node("RotaryEmbedding", [f"{name}heads", *node.input[1:]], f"{name}rotated"),
            _node("Transpose", [f"{name}rotated"], f"{name}tokens_first", perm=[0, 2, 1, 3]),
            _node("Reshape", [f"{name}tokens_first", together], node.output[0]),
        ]

    # -- plumbing ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """What nobody reads any more goes; constants come; the opset is the one of the ops in use."""
        read = {value.name for value in self.graph.output}
        nodes = []
        for node in reversed(self.graph.node):
            if read.intersection(node.output):
                nodes.append(node)
                read.update(node.input)
        replace_nodes(self.graph, nodes[::-1])
        self.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in self.constants.items())
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        used = {node.op_type for node in self.graph.node if node.domain == DOMAIN}
        functions = [function for function in self.model.functions if function.name in used]
        del self.model.functions[:]
        self.model.functions.extend(functions)
        for opsets in (self.model.opset_import, *(function.opset_import for function in functions)):
            for entry in opsets:
                if not entry.domain:
                    entry.version = OPSET

    def _sizes_of(self, name: str) -> set[str]:
        """Values that are the length of an input [B, length], as they stand in the graph."""
        found: set[str] = set()
        for node in self.graph.node:
            if node.op_type == "Shape" and node.input[0] == name:
                start = next((a.i for a in node.attribute if a.name == "start"), 0)
                if start == 1:
                    found.update(node.output)
            elif node.op_type in ("Squeeze", "Reshape") and node.input[0] in found:
                found.update(node.output)
        return found

    def _columns_of_call(self, node: onnx.NodeProto, window: str, length: str) -> list[onnx.NodeProto]:
        """x[:, -S:] -> of each sequence its columns write_at to write_at + S.

        Tokens behind a sequence's count may stand behind the window, when the buffers are full; they read 0.
        """
        name = f"{node.output[0]}."
        zero, one = self._constant("lowered.zero", 0), self._constant("lowered.one", 1)
        return [
            _node("Range", [zero, length, one], f"{name}range"),
            _node("Unsqueeze", [WRITE_AT, self._constant("lowered.axis_1", [1])], f"{name}starts"),
            _node("Add", [f"{name}starts", f"{name}range"], f"{name}wanted"),
            _node("Sub", [window, one], f"{name}last"),
            _node("Min", [f"{name}wanted", f"{name}last"], f"{name}columns"),
            _node("GatherElements", [node.input[0], f"{name}columns"], f"{name}found", axis=1),
            _node("Less", [f"{name}wanted", window], f"{name}inside"),
            _node("Where", [f"{name}inside", f"{name}found", zero], node.output[0]),
        ]

    def _behind_reshapes(self, name: str) -> str:
        producers = {out: node for node in self.graph.node for out in node.output}
        while name in producers and producers[name].op_type in ("Reshape", "Unsqueeze"):
            name = producers[name].input[0]
        return name

    def _constant(self, name: str, value: Any) -> str:
        """A constant by name; whole numbers become int64."""
        array = np.asarray(value)
        self.constants[name] = array.astype(np.int64) if array.dtype.kind in "iu" else array
        return name

    def _input(self, name: str, onnx_type: int, shape: list[int | str]) -> None:
        self.graph.input.append(helper.make_tensor_value_info(name, onnx_type, shape))


def _node(op: str, inputs: Sequence[str], out: str, **attributes: Any) -> onnx.NodeProto:
    """A node of a standard op, named like its only output."""
    return helper.make_node(op, list(inputs), [out], name=out, **attributes)


def _passes_exit(value: onnx.ValueInfoProto) -> bool:
    """Whether a value in the graph's own type passes from `draft` to `verify`."""
    return value.name.startswith("exit_") and value.type.tensor_type.elem_type != TensorProto.FLOAT


def _mask_name(index: str) -> str:
    """Which rows a choice keeps, [N, 1] bool, by the name of its index."""
    return f"{index}.column"
