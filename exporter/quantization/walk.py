"""The traceable decoder run eagerly on text, a layer at a time, as it will run in the graph: kept rows alone.

One layer's weights are in memory at a time, and several streams (one a budget) go through a layer together. The
statistics and the sensitivity pass both walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint import Checkpoint
from exporter.config import Branch
from exporter.decoder.ends import Entry, Exit, distinct_windows
from exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, Kept, KeyValue
from exporter.decoder.loading import load_entry, load_exit, load_layer

# Windows that the head takes at a time: logits are the largest values of a walk.
_HEAD_WINDOWS = 2
# How a stream chooses: thresholds [L, 2] float32, a budget (rank selection), or None (no gates).
Select = np.ndarray | float | None


@dataclass
class Stream:
    """A text on its way through the layers.

    Args:
        select: thresholds [L, 2], or K [1] (rank selection), or None.
        hidden: [N, H], the state that the next layer reads.
        below: K and V of the layer before, for the K/V policy `copy`.
    """

    select: Tensor | None
    hidden: Tensor
    below: KeyValue | None = None


class Walk:
    """A text and all that the layers read of it.

    Args:
        checkpoint: the model.
        ids: [M, S] int64, all of it tokens.
        options: selection and K/V policy; the computation is in float32.
        on_table: called with what holds the embedding, and with what holds the head, once their weights are there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: np.ndarray,
        options: DecoderOptions,
        on_table: Callable[[Entry | Exit], None] = lambda end: None,
    ) -> None:
        self.checkpoint = checkpoint
        self._on_table = on_table
        self.options = DecoderOptions(options.selection, options.kv_policy, torch.float32)
        self.ids = torch.from_numpy(ids)
        self._windows = distinct_windows(checkpoint.config)
        self._gated = checkpoint.config.gate is not None
        self._entry = load_entry(checkpoint, self.options)
        on_table(self._entry)
        self._budgeted = self._gated and self.options.selection == "rank"
        state = self._enter(1.0)
        self._hidden, self._cos, self._sin, *rest = state
        self._masks, self._call = rest[: len(self._windows)], rest[len(self._windows) :]

    def stream(self, select: Select) -> Stream:
        """The text at the first layer: select is thresholds [L, 2], a budget (rank selection), None without gates."""
        if not self._gated:
            return Stream(None, self._hidden)
        assert select is not None
        if self._budgeted:
            assert isinstance(select, float)
            return Stream(self._enter(select)[-1], self._hidden)
        return Stream(torch.as_tensor(select), self._hidden)

    def layers(self, first: int = 0) -> Iterator[tuple[int, DecoderLayer]]:
        """The model's layers from one on, each loaded when its turn comes."""
        for number in range(first, self.checkpoint.config.num_layers):
            yield number, load_layer(self.checkpoint, number, self.options)

    def through(self, number: int, layer: DecoderLayer, stream: Stream) -> dict[Branch, Tensor]:
        """Take a stream through a layer. Returns: for each gated branch, who was kept, [N] bool."""
        call, config = self._call_state(number, stream), layer.config
        empty = stream.hidden.new_zeros((len(self.ids), config.num_kv_heads, 0, config.head_dim))
        attn = self._choose(layer, "attn", stream, call)
        past = KeyValue(empty, empty)
        stream.hidden, _, stream.below = layer.attention_branch(stream.hidden, call, past, stream.below, attn)
        mlp = self._choose(layer, "mlp", stream, call)
        stream.hidden = layer.mlp_branch(stream.hidden, call, mlp)
        rows = torch.zeros(len(stream.hidden), dtype=torch.bool)
        chosen: dict[Branch, Kept | None] = {"attn": attn, "mlp": mlp}
        return {b: rows.index_fill(0, kept.index, True) for b, kept in chosen.items() if kept is not None}

    def _choose(self, layer: DecoderLayer, branch: Branch, stream: Stream, call: CallState) -> Kept | None:
        if branch not in layer.config.gated_branches:
            return None
        return layer.choose(branch, stream.hidden, layer.normed(branch, stream.hidden), call)

    def logits(self, stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        """What the head says at the end: ids [m, S] and logits [m, S, V], some windows at a time."""
        leave = load_exit(self.checkpoint, self.options)
        self._on_table(leave)
        rows = self.ids.shape[1] * _HEAD_WINDOWS
        for ids, hidden in zip(torch.split(self.ids, _HEAD_WINDOWS), torch.split(stream.hidden, rows), strict=True):
            yield ids, leave(hidden, ids)

    def _enter(self, budget: float) -> tuple[Tensor, ...]:
        positions = torch.arange(self.ids.shape[1]).expand(self.ids.shape)
        rank = (torch.tensor(budget, dtype=torch.float32),) if self._budgeted else ()
        state: tuple[Tensor, ...] = self._entry(self.ids, torch.ones_like(self.ids), positions, *rank)
        return state

    def _call_state(self, number: int, stream: Stream) -> CallState:
        mask = self._masks[self._windows.index(self.checkpoint.config.windows[number])]
        if stream.select is None:
            return CallState(self._cos, self._sin, mask, mask, self._cos, self._cos)  # the last three are not read
        select = stream.select if self._budgeted else stream.select[number]
        return CallState(self._cos, self._sin, mask, self._call[0], self._call[1], select)
