"""Putting traced parts together into the graphs of a bundle.

Names: the values of layer i begin with `layers.{i}.`. Reports use `layers.{i}.output` (its state),
`layers.{i}.{branch}.score` and `layers.{i}.{branch}.index` (the kept rows). Inputs and outputs are defined in
docs/design.md, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from gsx_engines.bundle import tensor_names
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.ends import Entry, Exit, LoopEntry, ShortExit, distinct_windows, places_of, table_names
from gsx_exporter.decoder.experts import RoutedMlp
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, KeyValue
from gsx_exporter.decoder.loading import Source, sources
from gsx_exporter.decoder.rule import TracedRule, Value, exit_watcher
from gsx_exporter.graph.layout import Layout
from gsx_exporter.graph.trace import Input, Part, trace
from gsx_exporter.graph.weights import ONNX_TYPES, Weight
from gsx_plugins.domain import CHOICES
from gsx_plugins.graph import make_node

# Sizes of the example inputs for tracing: distinct, so that no two axes are taken for the same.
_B, _S, _P = 2, 3, 5


class LayerPart(nn.Module):
    """A decoder layer with flat inputs and outputs, as the tracer takes them."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Run the layer.

        Args:
            hidden: [N, H].
            rest: key and value of the past, cos, sin, mask; where a loop begins that a token may leave out, the state
                that enters it; the values that the keep rule reads (`rule_inputs`); with the K/V policy `copy`, key and
                value of the layer below. Shapes as in `decoder/layer.py`.
        Returns: hidden, present key and value, new key and value, and the states that the rule carries.
        """
        past_key, past_value, cos, sin, mask, *more = rest
        rule = self.layer.rule
        stream = more.pop(0) if self.layer.begins_loop else None
        names = list(rule_inputs(rule))
        call = CallState(cos, sin, mask, dict(zip(names, more, strict=False)), stream)
        below = KeyValue(*more[len(names) :]) if self.layer.copies_below else None
        hidden, present, new, values = self.layer(hidden, call, KeyValue(past_key, past_value), below)
        return (hidden, *present, *new, *(values[name] for name in (rule.carried if rule else ())))


def rule_inputs(rule: TracedRule | None) -> Mapping[str, Value]:
    """What a layer's keep rule reads, in order: values of the call, carried states, the layer's part of others."""
    if rule is None:
        return {}
    parts = {name: value.of_layer for name, value in rule.of_layer().items()}
    return {**rule.entered(), **parts}


@dataclass(frozen=True)
class Graphs:
    """The graphs of a bundle, by name, and the weights that they share, without repetition."""

    models: Mapping[str, onnx.ModelProto]
    weights: list[Weight]


class GraphBuilder:
    """Traces each part of the decoder once and builds graphs from the parts.

    Args:
        checkpoint: only its configuration is read, no weights.
        options: keep rule, K/V policy, type.
        defaults: exported values of the keep rule's run-time inputs; those with an axis B have size 1 there.
        rewrite: applied to the graphs before they are returned (quantization); None for no rewrite.
        draft_tokens: ids that a draft chooses among, ascending; None for all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: DecoderOptions,
        defaults: Mapping[str, np.ndarray],
        rewrite: Callable[[Graphs], Graphs] | None = None,
        draft_tokens: Sequence[int] | None = None,
    ) -> None:
        self.checkpoint, self.options, self.defaults = checkpoint, options, defaults
        self.rewrite = rewrite
        self.config = config = checkpoint.config
        self.rule = options.rule
        assert set(defaults) == set(self.rule.inputs if self.rule else ()), "one default for each run-time input"
        with torch.device("meta"):
            entry = Entry(checkpoint.hf_config, config, options)
            layers = [DecoderLayer(config, options, i) for i in range(config.num_layers)]
            leave = Exit(config, options.dtype)
            loop = LoopEntry(config, options.dtype)
            short = None if draft_tokens is None else ShortExit(config, draft_tokens, options.dtype)
        self.entry = trace(entry, self._entry_inputs(), self._entry_outputs())
        self.copies_below = any(layer.copies_below for layer in layers)
        # Layers of one kind share a trace.
        kinds: dict[tuple[bool, ...], Part] = {}
        for layer in layers:
            kind = _kind(layer)
            if kind not in kinds:
                kinds[kind] = self._trace_layer(layer)
        self.parts = [kinds[_kind(layer)] for layer in layers]
        ids = Input((_B, _S), torch.int64, (0, 1))
        leaving = {"hidden": self._hidden(), "input_ids": ids}
        self.exit = trace(leave, leaving, ["logits"])
        self.draft_exit: Part | None = None
        if short is not None and draft_tokens is not None:
            self._places = places_of(draft_tokens, config.vocab_size).numpy()
            places = {tensor_names.DRAFT_PLACES: Input(self._places.shape, torch.int64)}
            self.draft_exit = trace(short, leaving | places, ["logits"])
        self.loop_entry: Part | None = None
        if config.loops is not None:
            self.loop_entry = trace(loop, {"hidden": self._hidden(), "first": self._hidden()}, ["stream"])
        self._entry_module, self._layer_modules, self._exit_module = entry, layers, leave
        self._loop_module, self._draft_exit_module = loop, short
        self._watcher = exit_watcher(self.rule)
        self._exit_depths = self._watcher.exit_depths() if self._watcher else ()
        self.exit_check: Part | None = None
        if self._watcher is not None and self.rule is not None:
            with torch.device("meta"):
                self._exit_check_module = module = self._watcher.exit_module(config, options.dtype)
            entered = {name: self._example(value) for name, value in self.rule.entered().items()}
            reads = {"hidden": self._hidden(), "entering": self._hidden(), **entered}
            next_states = [f"next_{name}" for name in self.rule.carried]
            self.exit_check = _name_checked_rows(trace(module, reads, next_states))

    def graphs(self, exit_layer: int | None) -> Graphs:
        """The decoder as `model`, and split at an exit layer as `draft` and `verify` (docs/design.md, section 6).

        Args:
            exit_layer: number of layers that the draft runs, in 1 to L - 1; None for only `model`.
        """
        depth = self.config.num_layers
        spans = {"model": range(depth)}
        if exit_layer is not None:
            spans |= {"draft": range(exit_layer), "verify": range(exit_layer, depth)}
        layouts = {name: self._decoder(f"gsx_{name}", layers) for name, layers in spans.items()}
        parameters = {name: source for _, used in layouts.values() for name, source in used.items()}
        graphs = Graphs({name: model for name, (model, _) in layouts.items()}, self._weights(parameters))
        return graphs if self.rewrite is None else self.rewrite(graphs)

    def _decoder(self, name: str, layers: range) -> tuple[onnx.ModelProto, dict[str, Source]]:
        """A graph of consecutive layers with final norm and head, and the parameters that it reads.

        A graph that begins at layer 0 reads embeddings; any other reads the state `exit_hidden`. A graph that ends
        before the last layer returns that state besides the logits. Other values that go from layer to layer pass the
        exit too: with the K/V policy `copy`, K and V of the layer below for this call's tokens (`exit_key`,
        `exit_value`), and the states that the keep rule carries (`exit_{name}` [B, S, 1]).
        """
        config = self.config
        graph = Layout()
        found = sources(self._entry_module, "")
        graph.add(self.entry, "", {}, {name: name for name in self.entry.outputs})
        inputs = [
            _value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            _value("attention_mask", TensorProto.INT64, ["batch", "total"]),
            _value("position_ids", TensorProto.INT64, ["batch", "sequence"]),
        ]
        outputs = [self._float("logits", ["batch", "sequence", config.vocab_size])]
        state = self._float("exit_hidden", ["batch", "sequence", config.hidden_size])
        heads, width = config.num_kv_heads, config.head_dim
        below_values = [self._float(n, ["batch", heads, "sequence", width]) for n in ("exit_key", "exit_value")]
        if not self.copies_below:
            below_values = []
        carried = {n: n for n in (self.rule.carried if self.rule else ())}
        carried_values = {n: _value(f"exit_{n}", TensorProto.FLOAT, ["batch", "sequence", 1]) for n in carried}
        hidden, first, caches = "hidden", "", set[int]()
        new: dict[int, tuple[str, str]] = {}  # of each layer, K and V of the call's tokens
        if layers.start:
            hidden, new[layers.start - 1] = "entering", ("exit_key", "exit_value")
            graph.reshape("exit_hidden", [-1, config.hidden_size], hidden)
            for n, value in carried_values.items():
                carried[n] = f"entering_{n}"
                graph.reshape(value.name, [-1, 1], carried[n])
            inputs = [state, *below_values, *carried_values.values(), *inputs]
        for i in layers:
            cache, leaves = config.cache_of(i), config.loops is None or config.loops.leaves_cache(i)
            past = (tensor_names.past(cache, "key"), tensor_names.past(cache, "value"))
            present = (tensor_names.present(cache, "key"), tensor_names.present(cache, "value"))
            if not leaves:
                present = (tensor_names.passing(cache, "key", i), tensor_names.passing(cache, "value", i))
            entering, stream = hidden, ""
            if self.loop_entry is not None and config.enters_loop(i):
                first, stream = first or hidden, f"layers.{i}.stream"
                graph.add(
                    self.loop_entry, "", {"hidden": hidden, "first": first}, {"stream": stream}, f"layers.{i}.loop."
                )
                found |= sources(self._loop_module, "")
                if not self._layer_modules[i].begins_loop:
                    hidden = stream
            below = new.get(config.below(i), ("", ""))
            hidden, new[i], carried = self._layer(graph, i, hidden, stream, below, carried, past, present)
            if self._watcher is not None and self.exit_check is not None and i + 1 in self._exit_depths:
                reads = {"hidden": hidden, "entering": entering, **carried}
                carried = self._check_exit(graph, self.exit_check, i + 1, reads)
                found |= sources(self._exit_check_module, self._watcher.exit_prefix(i + 1))
            found |= sources(self._layer_modules[i], f"layers.{config.layer_of(i)}.")
            if cache not in caches:
                caches.add(cache)
                inputs += [self._float(name, ["batch", heads, "past", width]) for name in past]
            if leaves:
                outputs += [self._float(name, ["batch", heads, "total", width]) for name in present]
        found |= self._leave(graph, hidden, drafts=layers.stop < config.num_layers)
        if layers.stop < config.num_layers:
            outputs[1:1] = [state]
            graph.shaped_like_ids(hidden, config.hidden_size, "exit_hidden")
            for source, value in zip(new[layers.stop - 1], below_values, strict=False):
                outputs.append(value)
                graph.name_output(source, value.name)
            for n, value in carried_values.items():
                outputs.append(value)
                graph.shaped_like_ids(carried[n], 1, value.name)
        inputs += self._run_time_inputs(graph)
        model, parameters = graph.model_proto(name, inputs, outputs)
        return model, {name: found[name] for name in parameters}

    def _leave(self, graph: Layout, hidden: str, *, drafts: bool) -> dict[str, Source]:
        """Add the final norm and the head. Returns: their parameters."""
        if not drafts or self.draft_exit is None or self._draft_exit_module is None:
            graph.add(self.exit, "", {"hidden": hidden}, {"logits": "logits"})
            return sources(self._exit_module, "")
        graph.add_constant(tensor_names.DRAFT_PLACES, self._places)
        graph.add(self.draft_exit, "", {"hidden": hidden}, {"logits": "logits"}, scope="draft.")
        return sources(self._draft_exit_module, "")

    def _layer(
        self,
        graph: Layout,
        i: int,
        hidden: str,
        stream: str,
        below: tuple[str, str],
        carried: dict[str, str],
        past: tuple[str, str],
        present: tuple[str, str],
    ) -> tuple[str, tuple[str, str], dict[str, str]]:
        """Add layer i. Returns: the names of its state, of its new K and V, and of the states that the rule carries."""
        prefix = f"layers.{i}."
        window = distinct_windows(self.config).index(self.config.windows[i])
        cos, sin = table_names(self.config)[self.config.rope_of(i)]
        reads = {
            "hidden": hidden,
            "past_key": past[0],
            "past_value": past[1],
            "cos": cos,
            "sin": sin,
            "mask": f"mask.{window}",
            "stream": stream,
            "below_key": below[0],
            "below_value": below[1],
            **carried,
            **self._own_parts(graph, i),
        }
        writes = {
            "output": prefix + "output",
            "present_key": present[0],
            "present_value": present[1],
            "new_key": prefix + "new_key",
            "new_value": prefix + "new_value",
            **{f"next_{name}": prefix + name for name in carried},
        }
        part = self.parts[i]
        graph.add(part, f"layers.{self.config.layer_of(i)}.", reads, writes, scope=prefix)
        passed = [name for name in carried if f"next_{name}" in part.outputs]
        leaving = {**carried, **{name: writes[f"next_{name}"] for name in passed}}
        return writes["output"], (writes["new_key"], writes["new_value"]), leaving

    def _check_exit(self, graph: Layout, part: Part, depth: int, reads: dict[str, str]) -> dict[str, str]:
        """Add the rule's exit module after `depth` layers. Returns: the names of the states that the rule carries."""
        assert self._watcher is not None
        assert self.rule is not None
        prefix = f"exits.{depth}."
        writes = {f"next_{name}": prefix + name for name in self.rule.carried}
        graph.add(part, self._watcher.exit_prefix(depth), reads, writes, scope=prefix)
        return {name: prefix + name for name in self.rule.carried}

    def _run_time_inputs(self, graph: Layout) -> list[onnx.ValueInfoProto]:
        """The keep rule's run-time inputs, with the exported values as defaults."""
        values = []
        axes: dict[int | str, int | str] = {"B": "batch", "L": self.config.num_layers}
        for name, value in (self.rule.inputs if self.rule else {}).items():
            default = np.asarray(self.defaults[name], _numpy_type(value.dtype))
            graph.add_constant(name, default)
            shape = [axes.get(axis, axis) for axis in value.axes]
            values.append(_value(name, helper.np_dtype_to_tensor_dtype(default.dtype), shape))
        return values

    def _own_parts(self, graph: Layout, layer: int) -> dict[str, str]:
        """Add the nodes that take a layer's part of each value with an axis L. Returns: value -> name of the part."""
        parts = {}
        for name, value in (self.rule.of_layer() if self.rule else {}).items():
            parts[name], index = f"layers.{layer}.{name}", f"layers.{layer}.number"
            axis = value.axes.index("L")
            graph.add_constant(index, layer)
            graph.append(make_node("Gather", [name, index], parts[name], axis=axis))
        return parts

    def _trace_layer(self, layer: DecoderLayer) -> Part:
        outputs = ["output", "present_key", "present_value", "new_key", "new_value"]
        outputs += [f"next_{name}" for name in (layer.rule.carried if layer.rule else ())]
        part = trace(LayerPart(layer), self._layer_inputs(layer), outputs)
        return _name_decisions(part, layer.skippable)

    def _entry_inputs(self) -> dict[str, Input]:
        int64 = torch.int64
        return {
            "input_ids": Input((_B, _S), int64, (0, 1)),
            "attention_mask": Input((_B, _P + _S), int64, (0, 1)),
            "position_ids": Input((_B, _S), int64, (0, 1)),
            **{name: self._example(value) for name, value in (self.rule.of_call() if self.rule else {}).items()},
        }

    def _entry_outputs(self) -> list[str]:
        masks = [f"mask.{n}" for n in range(len(distinct_windows(self.config)))]
        tables = [name for names in table_names(self.config).values() for name in names]
        return ["hidden", *tables, *masks, *(self.rule.entered() if self.rule else ())]

    def _layer_inputs(self, layer: DecoderLayer) -> dict[str, Input]:
        config, dtype = self.config, self.options.dtype
        heads, width = config.num_kv_heads, config.head_dim
        table = Input((1, _B * _S, config.rotary_dim // 2), dtype, (1,))
        cache = Input((_B, heads, _P, width), dtype, (0, 2))
        inputs = {
            "hidden": self._hidden(),
            "past_key": cache,
            "past_value": cache,
            "cos": table,
            "sin": table,
            "mask": Input((_B, 1, _S, _P + _S), torch.bool, (0, 2, 3)),
        }
        if layer.begins_loop:
            inputs["stream"] = self._hidden()
        inputs |= {name: self._example(value) for name, value in rule_inputs(layer.rule).items()}
        if layer.copies_below:
            below = Input((_B, heads, _S, width), dtype, (0, 2))
            inputs |= {"below_key": below, "below_value": below}
        return inputs

    def _example(self, value: Value) -> Input:
        """An example input for a value that a keep rule reads."""
        sizes = {"N": _B * _S, "B": _B, "L": self.config.num_layers}
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in value.axes)
        return Input(shape, value.dtype, tuple(n for n, axis in enumerate(value.axes) if axis in ("N", "B")))

    def _hidden(self) -> Input:
        return Input((_B * _S, self.config.hidden_size), self.options.dtype, (0,))

    def _float(self, name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
        return _value(name, ONNX_TYPES[self.options.dtype], shape)

    def _weights(self, parameters: Mapping[str, Source]) -> list[Weight]:
        """The weights to store: each parameter of the graphs, and where the checkpoint has it."""
        return [
            Weight(name, one.name, one.transpose, one.dtype, stack=one.stack, rows=one.rows)
            for name, one in parameters.items()
        ]


def _kind(layer: DecoderLayer) -> tuple[bool, ...]:
    """What tells a layer's nodes from another's."""
    mlp = isinstance(layer.mlp, RoutedMlp)
    return layer.rule is not None, layer.copies_below, layer.self_attn.rotates, mlp, layer.begins_loop


def _name_decisions(part: Part, branches: Sequence[Branch]) -> Part:
    """Give the scores and kept rows of each branch their names.

    A node that gathers from the same rows again belongs to what replaces a skipped branch, and makes no decision.
    """
    graph = part.graph
    decisions: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.op_type in CHOICES and node.input[0] not in {other.input[0] for other in decisions}:
            decisions.append(node)
    assert len(decisions) == len(branches)
    names: dict[str, str] = {}
    for branch, node in zip([b for b in BRANCHES if b in branches], decisions, strict=True):
        rows, score, bound = node.input
        if score in names:  # both branches have the same score, computed once
            graph.insert_before(node, make_node("Identity", [score], f"{branch}.score"))
            graph.set_inputs(node, [rows, f"{branch}.score", bound])
        else:
            names[score] = f"{branch}.score"
        names |= dict(zip(node.output, (f"{branch}.rows", f"{branch}.index", f"{branch}.count"), strict=True))
    graph.rename(names)
    return part


def _name_checked_rows(part: Part) -> Part:
    """Give names to the rows that an exit module runs on, if it does not run on all of them."""
    names: dict[str, str] = {}
    for node in part.graph.nodes:
        if node.op_type == "ThresholdGather":
            names[node.input[1]] = "asked.score"
            names |= dict(zip(node.output, ("asked.rows", "asked.index", "asked.count"), strict=True))
    part.graph.rename(names)
    return part


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _value(name: str, onnx_type: int, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_type, list(shape))
