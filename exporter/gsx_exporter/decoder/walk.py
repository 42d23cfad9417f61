"""Running the traceable decoder eagerly on text, layer by layer, on kept rows only, as the graph will.

One layer's weights are in memory at a time, and several streams (one for each budget, say) go through a layer together.
Of the tables before and after the layers only the rows that occur, or a block of rows at a time, are widened to
float32, and the MLP runs over some rows at a time: in a large model all of it would take more memory than a layer.
Calibration, quantization statistics, the layer study and the training of exit classifiers use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD
from gsx_exporter.decoder.ends import Shared, capped, shared_values
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, KeptRows, KeyValue
from gsx_exporter.decoder.loading import load_entry, load_exit_modules, load_final_norm, load_layer, load_loop_entry
from gsx_exporter.decoder.modules import Mlp
from gsx_exporter.decoder.rule import Values

# Layer, branch, residual stream and branch input [N, H], the call's state -> the rows that the branch runs on.
Choose = Callable[[DecoderLayer, Branch, Tensor, Tensor, CallState], KeptRows]
# Some rows of a table, [in, rows] float32 -> a function that gives them rounded, or None to leave them as they are.
RoundRows = Callable[[Tensor], Callable[[], Tensor] | None]

# Numbers that the head gives at a time (whole windows, at least one), and those of its weights that are widened for it.
_LOGITS, _HEAD_WEIGHTS = 1 << 26, 1 << 25
_MLP_ROWS = 1024


@dataclass
class Stream:
    """A text on its way through the layers.

    Args:
        inputs: the keep rule's run-time inputs.
        entered: what the rule computed once for the call, and its current carried states.
        hidden: [N, H], the state that the next layer reads.
        below: K and V of the last layer, by its number; in a looped model, also those that visits may still copy.
        first: [N, H], the state that entered the first loop; None before it, and in a model without loops.
    """

    inputs: Values
    entered: Values
    hidden: Tensor
    below: dict[int, KeyValue] = field(default_factory=dict)
    first: Tensor | None = None


class Walk:
    """A text, and what the layers read of it.

    Args:
        checkpoint: the model.
        ids: [M, S] int64, without padding.
        options: keep rule and K/V policy; the computation is in float32.
        round_rows: rounds the embedding's rows, and the head's; the model's own if not given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: np.ndarray,
        options: DecoderOptions,
        round_rows: tuple[RoundRows, RoundRows] = (lambda rows: None, lambda rows: None),
    ) -> None:
        self.checkpoint = checkpoint
        self.options = DecoderOptions(options.rule, options.kv_policy, torch.float32)
        self.ids = torch.from_numpy(ids)
        round_embedding, self._round_head = round_rows
        occurring, self._places = torch.unique(self.ids, return_inverse=True)
        self._entry = load_entry(checkpoint, self.options, occurring)
        rounded = round_embedding(self._entry.embed_tokens.t())
        if rounded is not None:
            self._entry.embed_tokens.data = rounded().t()
        self._call: Shared | None = None
        rule = self.options.rule
        self._carried = tuple(rule.carried) if rule else ()
        self._exit_modules = load_exit_modules(checkpoint, self.options)
        self._loop_entry = None if checkpoint.config.loops is None else load_loop_entry(checkpoint, self.options)

    def stream(self, controls: RuntimeValues) -> Stream:
        """The text at the first layer. Args: controls: the keep rule's run-time inputs."""
        rule = self.options.rule
        inputs = {name: torch.from_numpy(np.asarray(controls[name])) for name in (rule.inputs if rule else ())}
        positions = torch.arange(self.ids.shape[1]).expand(self.ids.shape)
        once = [inputs[name] for name in (rule.of_call() if rule else ())]
        hidden = self._entry.embedded(self._places)
        rest = self._entry.shared(self.ids, torch.ones_like(self.ids), positions, *once)
        # The same for every stream: it depends only on the text.
        self._call, own = shared_values(self.checkpoint.config, rest)
        entered = dict(zip(rule.entered() if rule else (), own, strict=True))
        return Stream(inputs, entered, hidden)

    def resumed(self, stream: Stream, controls: RuntimeValues) -> Stream:
        """The text where a stream is, with other run-time inputs from there on. The stream itself stays as it is.

        This is what the inputs would have given from the beginning only if they decided nothing so far.
        """
        fresh = self.stream(controls)
        carried = {name: stream.entered[name] for name in self._carried}
        return replace(fresh, entered={**fresh.entered, **carried}, hidden=stream.hidden, below=dict(stream.below))

    def layers(self, first: int = 0) -> Iterator[tuple[int, DecoderLayer]]:
        """The model's layers from number `first` on, each loaded when it is reached, and empty when the next one is."""
        for number in range(first, self.checkpoint.config.num_layers):
            layer = self.layer(number)
            yield number, layer
            layer.to_empty(device="meta")  # whoever takes the layers in a loop still has a name for this one

    def layer(self, number: int) -> DecoderLayer:
        """One layer, to be kept."""
        layer = load_layer(self.checkpoint, number, self.options)
        if isinstance(layer.mlp, Mlp):
            layer.mlp.rows_at_a_time = _MLP_ROWS
        return layer

    def through(
        self, number: int, layer: DecoderLayer, stream: Stream, choose: Choose | None = None
    ) -> dict[Branch, Tensor]:
        """Take a stream through a layer.

        Args: choose: gives the rows that a skippable branch runs on; None to use the layer's rule.
        Returns: for each skippable branch, which tokens were kept, [N] bool.
        """
        choose = choose or DecoderLayer.choose
        call, config, entering = self._call_state(number, stream), layer.config, stream.hidden
        if self._loop_entry is not None and config.enters_loop(number):
            stream.first = stream.hidden if stream.first is None else stream.first
            stream.hidden, call = self._loop_entry.before(layer, stream.hidden, stream.first, call)
        empty = stream.hidden.new_zeros((len(self.ids), config.num_kv_heads, 0, config.head_dim))
        attn = self._rows(layer, "attn", stream, call, choose)
        past = KeyValue(empty, empty)
        below = stream.below.pop(config.below(number), None)
        stream.hidden, _, new, values = layer.attention_branch(stream.hidden, call, past, below, attn)
        stream.below[number] = new
        call = call._replace(values=values)
        mlp = self._rows(layer, "mlp", stream, call, choose)
        stream.hidden, values = layer.mlp_branch(stream.hidden, call, mlp)
        rule = self.options.rule
        stream.entered = {**stream.entered, **{name: values[name] for name in (rule.carried if rule else ())}}
        if number + 1 in self._exit_modules:
            changed = self._exit_modules[number + 1](stream.hidden, entering, *stream.entered.values())
            stream.entered = {**stream.entered, **dict(zip(self._carried, changed, strict=True))}
        rows = torch.zeros(len(stream.hidden), dtype=torch.bool)
        chosen: dict[Branch, KeptRows | None] = {"attn": attn, "mlp": mlp}
        return {b: rows.index_fill(0, kept.index, True) for b, kept in chosen.items() if kept is not None}

    def _rows(
        self, layer: DecoderLayer, branch: Branch, stream: Stream, call: CallState, choose: Choose
    ) -> KeptRows | None:
        if branch not in layer.skippable:
            return None
        hidden = stream.hidden if call.stream is None or branch != "attn" else call.stream
        return choose(layer, branch, stream.hidden, layer.normed(branch, hidden), call)

    def logits(self, stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of the text after the last layer: ids [m, S] and logits [m, S, V], a few windows at a time."""
        norm, head = load_final_norm(self.checkpoint, self.options), self._head()
        length = self.ids.shape[1]
        windows = max(1, _LOGITS // (length * self.checkpoint.config.vocab_size))
        for ids, hidden in zip(
            torch.split(self.ids, windows), torch.split(stream.hidden, windows * length), strict=True
        ):
            yield ids, self._logits(norm(hidden), head).view(*ids.shape, -1)

    def _head(self) -> list[Callable[[], Tensor]]:
        """The head in blocks, each a function that gives it as [H, rows] float32."""
        config = self.checkpoint.config
        table = self.checkpoint.parameter(EMBEDDING if config.tied_head else HEAD)

        def widened(rows: Tensor) -> Tensor:
            return rows.to(torch.float32).t()

        blocks = torch.split(table, max(1, _HEAD_WEIGHTS // config.hidden_size))
        return [self._round_head(widened(rows)) or functools.partial(widened, rows) for rows in blocks]

    def _logits(self, normed: Tensor, head: list[Callable[[], Tensor]]) -> Tensor:
        """Normed states [n, H] -> [n, V]."""
        config, found = self.checkpoint.config, normed.new_empty((len(normed), self.checkpoint.config.vocab_size))
        start = 0
        for block in head:
            logits = capped(torch.matmul(normed, block()), config.scales.logits_cap)
            found[:, start : start + logits.shape[1]] = logits
            start += logits.shape[1]
        return found

    def _call_state(self, number: int, stream: Stream) -> CallState:
        rule = self.options.rule
        values = rule.values_of(number, stream.inputs, stream.entered) if rule else {}
        assert self._call is not None, "no stream was made"
        return self._call.of_layer(self.checkpoint.config, number, values)
