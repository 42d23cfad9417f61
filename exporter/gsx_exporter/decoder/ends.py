"""What comes before and after the layers: embeddings and the values that every layer reads; final norm and head.

Letters as in `layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions
from gsx_exporter.decoder.modules import Linear
from gsx_exporter.decoder.norm import norm_of
from gsx_exporter.decoder.rotary import RotaryTables
from gsx_exporter.decoder.rule import Tokens, Values


class Entry(nn.Module):
    """Token ids -> embeddings, and the values that every layer reads.

    Returns, in order: hidden [N, H]; cos and sin [1, N, W/2] of each kind of RoPE (`ModelConfig.ropes`); one mask
    [B, 1, S, T] bool per distinct window of the model (`windows`); and what the keep rule computes once per call
    (`TracedRule.entered`).
    """

    def __init__(self, hf_config: Any, config: ModelConfig, options: DecoderOptions) -> None:
        super().__init__()
        self.config, self.options = config, options
        self.embed_tokens = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=options.dtype), requires_grad=False
        )
        self.rotary = nn.ModuleList(RotaryTables(hf_config, config, kind, options.dtype) for kind in config.ropes)
        self.windows = distinct_windows(config)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the values that every layer reads.

        Args:
            input_ids, position_ids: [B, S] int64.
            attention_mask: [B, T] int64, 1 for tokens, 0 for padding.
            inputs: the run-time inputs that the keep rule reads once per call (`TracedRule.of_call`), in order.
        """
        return self.embedded(input_ids), *self.shared(input_ids, attention_mask, position_ids, *inputs)

    def embedded(self, places: Tensor) -> Tensor:
        """places [B, S] int64, rows of the table -> hidden [N, H]."""
        hidden = torch.nn.functional.embedding(places.reshape(-1), self.embed_tokens)
        return hidden if self.config.scales.embedding == 1.0 else hidden * self.config.scales.embedding

    def shared(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """What `forward` returns behind hidden."""
        tables = [table for kind in self.rotary for table in kind(position_ids)]
        length = input_ids.shape[1]
        masks = [attention_mask_of(attention_mask, length, window) for window in self.windows]
        state = (*tables, *masks)
        rule = self.options.rule
        if rule is None:
            return state
        # The valid tokens of the call are the last S columns of the mask.
        valid = attention_mask[:, attention_mask.shape[1] - length :].reshape(-1) != 0
        tokens = Tokens(input_ids.reshape(-1), valid, position_ids)
        values = rule.enter(tokens, dict(zip(rule.of_call(), inputs, strict=True)))
        return (*state, *(values[name] for name in rule.entered()))


class Exit(nn.Module):
    """States -> logits: final norm and LM head. After layer E-1 it is the early exit (docs/design.md, section 3)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm_of(config, config.hidden_size, dtype)
        self.tied, self.cap = config.tied_head, config.scales.logits_cap
        if self.tied:  # under the same name as in Entry, so that the weight is stored once
            shape = (config.vocab_size, config.hidden_size)
            self.embed_tokens = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype)

    def forward(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """hidden [N, H], input_ids [B, S] (only its shape is read) -> [B, S, V]."""
        return self.logits(hidden.view(*input_ids.shape, hidden.shape[1]))

    def logits(self, states: Tensor) -> Tensor:
        """[.., H] -> [.., V]."""
        normed = self.norm(states)
        logits: Tensor = torch.matmul(normed, self.embed_tokens.t()) if self.tied else self.lm_head(normed)
        return capped(logits, self.cap)


class ShortExit(nn.Module):
    """The early exit of a draft that chooses among N of the V tokens: only their rows of the head are multiplied.

    The product is the head's own, so the logits of these tokens are those of `Exit`.

    Args: tokens: their ids, ascending.
    """

    def __init__(self, config: ModelConfig, tokens: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm_of(config, config.hidden_size, dtype)
        self.cap = config.scales.logits_cap
        self.draft_head = HeadRows(config, tokens, dtype)

    def forward(self, hidden: Tensor, input_ids: Tensor, places: Tensor) -> Tensor:
        """hidden [N, H], input_ids [B, S] (only its shape is read), places [V] (`places_of`) -> [B, S, V].

        A token that the draft never chooses has minus infinity, so that ids and everything behind the logits stay the
        model's: no bias or temperature makes anything of it, and its probability is 0.
        """
        states = hidden.view(*input_ids.shape, hidden.shape[1])
        logits = capped(self.draft_head(self.norm(states)), self.cap)
        return torch.nn.functional.pad(logits, (0, 1), value=-math.inf).index_select(-1, places)


class HeadRows(Linear):
    """Some tokens' rows of the head, as a linear layer. Args: tokens: their ids."""

    def __init__(self, config: ModelConfig, tokens: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(config.hidden_size, len(tokens), False, dtype)
        self.tokens, self.tied = tuple(tokens), config.tied_head


def places_of(tokens: Sequence[int], vocabulary: int) -> Tensor:
    """Token id -> its place among `tokens`, [V] int64; of any other token, their number."""
    places = torch.full((vocabulary,), len(tokens), dtype=torch.int64)
    places[torch.tensor(tokens)] = torch.arange(len(tokens), dtype=torch.int64)
    return places


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits with the model's soft cap, if it has one."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class LoopEntry(nn.Module):
    """The state with which a loop begins, from the one that left the layer before it (`LoopKeys.rejoins`)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm_of(config, config.hidden_size, dtype)
        self.rejoins = config.rejoins

    def forward(self, hidden: Tensor, first: Tensor) -> Tensor:
        """hidden, and the state that entered the first loop, [N, H] -> [N, H]."""
        normed = self.norm(hidden)
        return normed + self.norm(first) if self.rejoins else normed

    def before(self, layer: DecoderLayer, hidden: Tensor, first: Tensor, call: CallState) -> tuple[Tensor, CallState]:
        """What a layer that begins a loop reads: where a token may leave the loop out, its own state stays as it is."""
        begun = self(hidden, first)
        return (hidden, call._replace(stream=begun)) if layer.begins_loop else (begun, call)


class Shared(NamedTuple):
    """What every layer reads, apart from the keep rule's values.

    Args:
        tables: kind of RoPE -> cos and sin [1, N, W/2].
        masks: window -> [B, 1, S, T] bool.
    """

    tables: Mapping[str, tuple[Tensor, Tensor]]
    masks: Mapping[int | None, Tensor]

    def of_layer(self, config: ModelConfig, layer: int, values: Values) -> CallState:
        """What one layer reads. Args: values: those of the keep rule there."""
        cos, sin = self.tables[config.rope_of(layer)]
        return CallState(cos, sin, self.masks[config.windows[layer]], values)


def shared_values(config: ModelConfig, found: Sequence[Tensor]) -> tuple[Shared, Sequence[Tensor]]:
    """What `Entry` returns behind the embeddings, taken apart: what all layers read, and the keep rule's values."""
    kinds, windows = tuple(config.ropes), distinct_windows(config)
    tables = {kind: (found[2 * n], found[2 * n + 1]) for n, kind in enumerate(kinds)}
    rest = found[2 * len(kinds) :]
    return Shared(tables, dict(zip(windows, rest, strict=False))), rest[len(windows) :]


def table_names(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """Kind of RoPE -> the names of its cosines and sines in the graph."""
    return {kind: (f"cos.{n}", f"sin.{n}") if n else ("cos", "sin") for n, kind in enumerate(config.ropes)}


def distinct_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """The attention windows that the model's layers use, each once, in order of first use."""
    return tuple(dict.fromkeys(config.windows))


def attention_mask_of(attention_mask: Tensor, length: int, window: int | None) -> Tensor:
    """Which tokens the last `length` tokens attend to: [B, T] int64 -> [B, 1, S, T] bool.

    A token attends to itself and to earlier tokens that are not padding, `window` positions at most, itself included;
    padding does not count as a position, wherever it is. A padding token attends only to itself, because a row without
    any token would give NaN.
    """
    total = attention_mask.shape[1]
    columns = torch.arange(total)
    rows = torch.arange(length).unsqueeze(1) + (total - length)
    seen = (columns <= rows) & (attention_mask != 0).unsqueeze(1)
    if window is not None:
        positions = attention_mask.cumsum(dim=1)
        seen = seen & (positions.unsqueeze(1) > positions[:, total - length :].unsqueeze(2) - window)
    return (seen | (columns == rows)).unsqueeze(1)
