"""The quality that a bundle's arithmetic costs, against full precision at the same budget, and its limits.

Rounding to 8 bits is not an error, so the question is not how close the numbers are, but how well the model still
predicts text, and whether tokens still skip the same branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gsx.defaults import QUALITY_LIMIT
from gsx.parity.closeness import Observation
from gsx_engines.bundle.words import BRANCHES
from gsx_plugins.errors import UsageError


@dataclass(frozen=True)
class QualityLimits:
    """Limits of the quality loss, at budgets from 1 down to the exported one; None: only reported.

    Args:
        perplexity_increase: relative; 0.01 is one percent.
        flipped: share of keep/skip decisions that differ.
        divergence: mean KL divergence of the next-token distribution, in nats.
        top1: least share of tokens whose most likely next token is the same.
    """

    perplexity_increase: float | None = None
    flipped: float | None = None
    divergence: float | None = None
    top1: float | None = None

    def __post_init__(self) -> None:
        for name in ("perplexity_increase", "flipped", "divergence", "top1"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(
                    f"quality limit {name.replace('_', ' ')}", expected="a number from 0 up", found=f"{value}"
                )

    def over(self, other: QualityLimits) -> QualityLimits:
        """These limits, with gaps filled from `other`."""
        return QualityLimits(
            *(
                mine if mine is not None else theirs
                for mine, theirs in (
                    (self.perplexity_increase, other.perplexity_increase),
                    (self.flipped, other.flipped),
                    (self.divergence, other.divergence),
                    (self.top1, other.top1),
                )
            )
        )


# Limits of a quantized bundle, unless the user gives others; full precision has stricter checks of its own.
QUANTIZED = QualityLimits(perplexity_increase=QUALITY_LIMIT, flipped=QUALITY_LIMIT)


@dataclass(frozen=True)
class Quality:
    """Quality over whole windows of text.

    Args:
        divergence: mean KL divergence of the next-token distribution from the reference's, in nats.
        top1: share of tokens whose most likely next token is the reference's.
        flipped: [L][attn, mlp] shares of decisions that differ, including those that only follow from an earlier
            difference; 0 where there is no gate.
        flipped_share: over all gated branches; None for a dense model.
    """

    divergence: float
    top1: float
    flipped: tuple[tuple[float, float], ...]
    flipped_share: float | None

    @property
    def most_flipped(self) -> tuple[int, str, float]:
        """Layer, branch and share where most decisions flipped."""
        shares = np.array(self.flipped)
        layer, column = np.unravel_index(int(shares.argmax()), shares.shape)
        return int(layer), BRANCHES[int(column)], float(shares[layer, column])


@dataclass
class QualityCounter:
    """Accumulates quality over windows. Args: branches: columns of the gated branches."""

    branches: Sequence[int]
    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0
    flips: list[np.ndarray] = field(default_factory=list)

    def add(self, reference: Observation, found: Observation) -> None:
        """Compare one window."""
        want, have = _log_shares(reference.logits), _log_shares(found.logits)
        self.tokens += len(want)
        self.divergence += float((np.exp(want) * (want - have)).sum())
        self.agreed += int((want.argmax(axis=-1) == have.argmax(axis=-1)).sum())
        self.flips.append(reference.keep != found.keep)

    def result(self) -> Quality:
        """The result over everything that was added."""
        shares = np.concatenate(self.flips, axis=-1).mean(axis=-1)
        return Quality(
            divergence=self.divergence / self.tokens,
            top1=self.agreed / self.tokens,
            flipped=tuple((float(attn), float(mlp)) for attn, mlp in shares),
            flipped_share=float(shares[:, list(self.branches)].mean()) if self.branches else None,
        )


def _log_shares(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shares: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shares
