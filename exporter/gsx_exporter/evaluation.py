"""How well a model predicts text: the mean loss per token of the reference, or of anything that returns logits; and how
far its next-token distributions are from another's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from gsx_engines.bundle.words import KvPolicy
from gsx_exporter.reference.model import Reference
from gsx_exporter.reference.rule import ReferenceRule

# Windows [B, S] int64 -> logits [B, S, V].
LogitsOf = Callable[[np.ndarray], np.ndarray]
# Tokens whose next-token distributions are in memory at a time, in float64. Of a large vocabulary, blocks below
# 32 MB are from glibc's heap, which kept 2 GB of them.
_BLOCK_TOKENS = 64


class Rows(Protocol):
    """Rows [S, W], in memory or elsewhere: a slice reads them."""

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Quality:
    """Loss of a text.

    Args:
        nats: mean loss per predicted token.
        tokens: number of predicted tokens: all but the first of each window.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.nats)


def losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Loss of every token except the first: logits [.., S, V], ids [.., S] -> [.., S - 1] float64, in nats."""
    scores = logits[..., :-1, :].astype(np.float32)
    scores -= scores.max(axis=-1, keepdims=True)
    targets = np.take_along_axis(scores, ids[..., 1:, None], axis=-1)[..., 0]
    found: np.ndarray = np.log(np.exp(scores).sum(axis=-1, dtype=np.float64)) - targets
    return found


@dataclass(frozen=True)
class NextTokens:
    """What two sides say of the next token, over one window of S tokens.

    Args:
        divergence: [S], KL divergence of the distribution from the reference's, in nats.
        differing: [S] bool, whether the most likely token is another one.
        reference_losses, losses: [S - 1] in nats, of every token but the first.
    """

    divergence: np.ndarray
    differing: np.ndarray
    reference_losses: np.ndarray
    losses: np.ndarray


def next_tokens(window: np.ndarray, reference: Rows, found: Rows) -> NextTokens:
    """Compare logits [S, V] over a window [S] of token ids; in float64, since equal sides give differences of it."""
    parts = []
    for start in range(0, len(window), _BLOCK_TOKENS):
        rows = slice(start, start + _BLOCK_TOKENS)
        want, have = (torch.from_numpy(side[rows]).double().log_softmax(-1) for side in (reference, found))
        ids = torch.from_numpy(window[start + 1 : start + 1 + len(want)])[:, None]
        wanted, had = (-side[: len(ids)].gather(1, ids)[:, 0] for side in (want, have))
        differing = want.argmax(-1) != have.argmax(-1)
        divergence = (want.exp() * (want - have)).sum(-1)
        parts.append((divergence, differing, wanted, had))
    return NextTokens(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def evaluate(logits_of: LogitsOf, windows: np.ndarray, *, batch: int = 4) -> Quality:
    """Quality over windows [M, S] int64, `batch` windows at a time."""
    total, tokens = 0.0, 0
    for start in range(0, len(windows), batch):
        ids = windows[start : start + batch]
        found = losses(logits_of(ids), ids)
        total += float(found.sum())
        tokens += found.size
    return Quality(total / tokens, tokens)


def reference_logits(reference: Reference, rule: ReferenceRule | None, kv_policy: KvPolicy = "compute") -> LogitsOf:
    """The reference under a keep rule, as a function for `evaluate`."""

    def run(ids: np.ndarray) -> np.ndarray:
        output = reference(torch.from_numpy(ids), rule=rule, kv_policy=kv_policy)
        logits: np.ndarray = output.logits.float().numpy()
        return logits

    return run
