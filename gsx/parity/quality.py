"""The quality that a bundle's arithmetic costs, against full precision at the same budget, and its limits.

Rounding to 8 bits is not an error, so the question is not how close the numbers are, but how far the next-token
distribution moved, how well the model still predicts text, and whether tokens still skip the same branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import special

from gsx.defaults import (
    DIVERGENCE_LIMIT,
    HALF_DIVERGENCE_LIMIT,
    INT4_DIVERGENCE_LIMIT,
    INT4_PERPLEXITY_LIMIT,
    INT4_TOP1_LIMIT,
    QUALITY_LIMIT,
    TOP1_LIMIT,
    WEIGHTS_DIVERGENCE_LIMIT,
)
from gsx.parity.estimate import Estimate, mean_of, share_of
from gsx_engines.bundle.manifest import Manifest, SchemeName
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.evaluation import NextTokens
from gsx_plugins.errors import UsageError

# exp of more than this overflows.
_MOST_NATS = 700.0


@dataclass(frozen=True)
class QualityLimits:
    """Limits of the quality loss, at budgets from 1 down to the exported one; None: only reported.

    Args:
        perplexity_increase: relative change, up or down: rounding moves a loss either way, so a fall beyond the limit
            is damage that happened to suit the text, and no improvement. 0.01 is one percent.
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


# Limits unless the user gives others. Nobody can tell a text at 1 % more perplexity from the original's, and the 8 bits
# that people trust stay within it. It alone can be fooled: on one text, losses and gains may cancel. KL divergence
# cannot be, since every token adds to it. 0.02 nats is what 8-bit products reach with care on a real model, and goes
# along with changing 4 to 6 % of next tokens, which 93 % leaves room for.
ACTIVATIONS = QualityLimits(
    perplexity_increase=QUALITY_LIMIT, flipped=QUALITY_LIMIT, divergence=DIVERGENCE_LIMIT, top1=TOP1_LIMIT
)
# Weights have no outliers that only some texts bring up: 8 bits of SmolLM2's cost 0.006 to 0.0095 nats, by text.
WEIGHTS = QualityLimits(
    perplexity_increase=QUALITY_LIMIT, flipped=QUALITY_LIMIT, divergence=WEIGHTS_DIVERGENCE_LIMIT, top1=TOP1_LIMIT
)
# 4 bits are chosen for bytes and speed by people who accept that the text changes. These limits keep the divergence to
# a quarter of what ONNX Runtime GenAI's default has on SmolLM2 (0.43 nats; 63 % of next tokens are the same).
FOUR_BITS = QualityLimits(
    perplexity_increase=INT4_PERPLEXITY_LIMIT,
    flipped=QUALITY_LIMIT,
    divergence=INT4_DIVERGENCE_LIMIT,
    top1=INT4_TOP1_LIMIT,
)
# 16 bits have limits of their own on numbers, but these grow with the largest logit, and leave out all that follows a
# flipped decision. Decisions have a limit there.
HALF = QualityLimits(perplexity_increase=QUALITY_LIMIT, divergence=HALF_DIVERGENCE_LIMIT, top1=TOP1_LIMIT)


# By scheme of quantization.
OF_SCHEMES: Mapping[SchemeName, QualityLimits] = {
    "int8": ACTIVATIONS,
    "fp8": ACTIVATIONS,
    "int8-weights": WEIGHTS,
    "int4": FOUR_BITS,
}


def default_limits(manifest: Manifest) -> QualityLimits:
    """Limits for what a bundle rounds: products or K and V in 8 bits, only weights, or all to 16 bits."""
    quantization = manifest.quantization
    if quantization is not None:
        limits = OF_SCHEMES[quantization.scheme]
        # K and V in 8 bits come on top of weights that are nearly exact.
        return ACTIVATIONS if manifest.kv_cache is not None and limits is WEIGHTS else limits
    if manifest.kv_cache is not None:
        return ACTIVATIONS
    return QualityLimits() if manifest.precision == "fp32" else HALF


@dataclass(frozen=True)
class Estimates:
    """The measured values with their confidence intervals.

    Args:
        perplexity: relative change, below 0 if it fell.
        divergence: as in `Quality`, of the portable graph; fast_divergence: the same of the runner that generates,
            None if it was not run.
        differing: share of tokens whose most likely next token is not the reference's.
        flipped: share of decisions that differ; None for a dense model.
    """

    perplexity: Estimate
    divergence: Estimate
    fast_divergence: Estimate | None
    differing: Estimate
    flipped: Estimate | None


@dataclass(frozen=True)
class Quality:
    """Quality over whole windows of text.

    Args:
        divergence: mean KL divergence of the next-token distribution from the reference's, in nats.
        top1: share of tokens whose most likely next token is the reference's.
        flipped: [L][attn, mlp] shares of decisions that differ, including those that only follow from an earlier
            difference; 0 where there is no gate.
        flipped_share: over all gated branches; None for a dense model.
        estimates: all of them with confidence intervals, and the change of perplexity.
    """

    divergence: float
    top1: float
    flipped: tuple[tuple[float, float], ...]
    flipped_share: float | None
    estimates: Estimates

    @property
    def most_flipped(self) -> tuple[int, str, float]:
        """Layer, branch and share where most decisions flipped."""
        shares = np.array(self.flipped)
        layer, column = np.unravel_index(int(shares.argmax()), shares.shape)
        return int(layer), BRANCHES[int(column)], float(shares[layer, column])


@dataclass(frozen=True)
class Closeness:
    """How close next-token distributions are to the reference's, as means over tokens.

    Args: as in `Estimates`.
    """

    perplexity: Estimate
    divergence: Estimate
    differing: Estimate


def closeness(windows: Sequence[NextTokens]) -> Closeness:
    """The means over some windows."""
    return Closeness(
        perplexity=mean_of([one.losses - one.reference_losses for one in windows]).map(_change),
        divergence=_from_0(mean_of([one.divergence for one in windows])),
        differing=share_of([one.differing for one in windows]),
    )


@dataclass
class QualityCounter:
    """Accumulates quality over windows. Args: branches: columns of the gated branches."""

    branches: Sequence[int]
    _windows: list[NextTokens] = field(default_factory=list)
    _fast_divergences: list[np.ndarray] = field(default_factory=list)
    _flips: list[np.ndarray] = field(default_factory=list)

    def add(self, found: NextTokens, flips: np.ndarray) -> None:
        """Add a window of S tokens of the portable graph. Args: flips: [L, 2, S] bool, the decisions that differ."""
        self._windows.append(found)
        self._flips.append(flips)

    def add_fast(self, divergence: np.ndarray) -> None:
        """Add the KL divergence [S] of the runner that generates, over the next window."""
        self._fast_divergences.append(divergence)

    def add_fast_like_portable(self) -> None:
        """The same where that runner runs the portable graph."""
        self.add_fast(self._windows[len(self._fast_divergences)].divergence)

    @property
    def nats(self) -> tuple[float, float]:
        """Mean loss per token, of the reference and of the portable graph."""
        reference = np.concatenate([window.reference_losses for window in self._windows])
        return float(reference.mean()), float(np.concatenate([window.losses for window in self._windows]).mean())

    @property
    def scored_tokens(self) -> int:
        """Tokens that have a loss."""
        return sum(window.losses.size for window in self._windows)

    def result(self) -> Quality:
        """The result over everything that was added."""
        shares = np.concatenate(self._flips, axis=-1).mean(axis=-1)
        gated = list(self.branches)
        close = closeness(self._windows)
        estimates = Estimates(
            perplexity=close.perplexity,
            divergence=close.divergence,
            fast_divergence=_from_0(mean_of(self._fast_divergences)) if self._fast_divergences else None,
            differing=close.differing,
            flipped=_from_0(mean_of([flips[:, gated].mean(axis=(0, 1)) for flips in self._flips])) if gated else None,
        )
        return Quality(
            divergence=estimates.divergence.value,
            top1=1 - estimates.differing.value,
            flipped=tuple((float(attn), float(mlp)) for attn, mlp in shares),
            flipped_share=float(shares[:, gated].mean()) if gated else None,
            estimates=estimates,
        )


def frequency_nats(ids: np.ndarray) -> float:
    """Mean loss of guessing each of these tokens by how often it occurs among them: all that can be known without a
    model. A model that does no better has learned nothing that this text shows."""
    counts = np.unique(ids, return_counts=True)[1]
    return float(special.entr(counts / counts.sum()).sum())


def _from_0(estimate: Estimate) -> Estimate:
    """The estimate of something that is never below 0, and whose interval need not be either."""
    return replace(estimate, low=max(0.0, estimate.low))


def _change(nats: float) -> float:
    """A difference of losses as a relative change of perplexity."""
    return math.expm1(nats) if nats < _MOST_NATS else math.inf
