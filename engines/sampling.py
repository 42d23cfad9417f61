"""Choosing the next token from logits: greedy, or sampled after temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engines.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        seed: of the random numbers; None for a fresh one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError("temperature", expected="a number of at least 0", found=str(self.temperature))
        if self.top_k < 0:
            raise UsageError("top-k", expected="0 (all) or more", found=str(self.top_k))
        if not 0 < self.top_p <= 1:
            raise UsageError("top-p", expected="a number above 0 and at most 1", found=str(self.top_p))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


GREEDY = Sampling()


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [V] float64 of the next token, after temperature, then top-k, then top-p; logits [V].

    Top-p keeps the shortest run of tokens, likeliest first, whose probabilities reach `top_p`.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if sampling.top_p < 1:
        reached = np.cumsum(weights)
        count = int(np.searchsorted(reached, sampling.top_p)) + 1
        order, weights = order[:count], weights[:count] / weights[:count].sum()
    full = np.zeros(len(logits))
    full[order] = weights
    return full


def pick(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token, from logits [V]."""
    if sampling.greedy:
        return int(logits.argmax())
    probabilities = distribution(logits, sampling)
    return int(rng.choice(len(probabilities), p=probabilities))
