"""Calibrating a threshold with a guarantee: fixed-sequence testing from Learn then Test, as CALM calibrates its exits.

A risk is a number in [0, 1] that each prompt has at each threshold: how far skipping work changes what the model does
(`agreement_risk`, `loss_risk`). The goal is the boldest threshold whose mean risk, over the distribution that the
prompts were drawn from, is at most a tolerance delta, with a guarantee that this holds with probability 1 - epsilon
over the draw of the calibration prompts.

Thresholds are tested from the most careful to the boldest. At each one, the hypothesis "the mean risk is above delta"
is tested at level epsilon. Testing stops at the first threshold where it is not rejected; the last one where it was
rejected is the result. Because the order is fixed before the risks are seen, the probability of ending at a threshold
whose mean risk is above delta is at most epsilon, however many are tested.

Sources: CALM (arXiv 2207.07061), calibration by fixed-sequence testing; Learn then Test (arXiv 2110.01052), the
Hoeffding-Bentkus p-value. It is never above CALM's exp(-2 n (delta - mean)^2). Both are valid for any risk in [0, 1];
this one needs fewer prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import bdtr

from gsx_plugins.errors import UsageError

# The share of next tokens that differ from the full model's, or the increase of the loss.
Risk = Literal["agreement", "loss"]


@dataclass(frozen=True)
class RiskTarget:
    """A guarantee: the mean risk is at most `tolerance`, with probability `confidence`.

    Args:
        tolerance: delta, in (0, 1), in the unit of the risk.
        confidence: 1 - epsilon, in (0, 1).
    """

    tolerance: float
    confidence: float

    def __post_init__(self) -> None:
        for name, value in (("tolerance", self.tolerance), ("confidence", self.confidence)):
            if not (math.isfinite(value) and 0 < value < 1):
                raise UsageError(f"{name} of a guarantee", expected="a number between 0 and 1", found=f"{value:g}")

    @property
    def prompts_needed(self) -> int:
        """The fewest prompts that can give the guarantee: with fewer, not even a risk of 0 on all of them is enough."""
        # p-value of risk 0 with n prompts: (1 - tolerance)^n.
        exact = math.log1p(-self.confidence) / math.log1p(-self.tolerance)
        return max(1, math.ceil(exact - 1e-9))


@dataclass(frozen=True)
class Tested:
    """A tested threshold: mean risk over the prompts, p-value, and whether "risk above tolerance" was rejected."""

    threshold: float
    mean_risk: float
    p_value: float
    accepted: bool


@dataclass(frozen=True)
class Outcome:
    """The result of the test.

    Args:
        guarantee: as asked for.
        prompts: n.
        tested: thresholds in the order of testing; all are accepted, except possibly the last.
    """

    guarantee: RiskTarget
    prompts: int
    tested: tuple[Tested, ...]

    @property
    def threshold(self) -> float | None:
        """The boldest threshold that meets the guarantee; None if there is none."""
        accepted = [one.threshold for one in self.tested if one.accepted]
        return accepted[-1] if accepted else None


def p_value(mean_risk: float, prompts: int, tolerance: float) -> float:
    """p-value of "the mean risk is above the tolerance": Hoeffding-Bentkus, for risks in [0, 1].

    Args:
        mean_risk: over the prompts.
        prompts: n, independent draws.
        tolerance: delta, in (0, 1).
    Source: arXiv 2110.01052, the smaller of exp(-n KL(min(mean, delta), delta)) and
        e P(Bin(n, delta) <= ceil(n mean)).
    """
    if mean_risk >= tolerance:
        return 1.0
    divergence = (1 - mean_risk) * math.log((1 - mean_risk) / (1 - tolerance))
    if mean_risk > 0:
        divergence += mean_risk * math.log(mean_risk / tolerance)
    # A product that rounding made slightly too large must not count as one more failure.
    failures = math.ceil(round(prompts * mean_risk, 9))
    bentkus = math.e * float(bdtr(failures, prompts, tolerance))
    return min(math.exp(-prompts * divergence), bentkus, 1.0)


def fixed_sequence_test(
    thresholds: Sequence[float], risks_at: Callable[[float], np.ndarray], prompts: int, guarantee: RiskTarget
) -> Outcome:
    """Test thresholds from the most careful to the boldest, as long as the guarantee is met.

    Args:
        thresholds: in that order, fixed without looking at the risks.
        risks_at: threshold -> [n] risk of each prompt, in [0, 1]; not called again after the first failure.
        prompts: n.
        guarantee: tolerance and confidence.
    Raises:
        UsageError: too few prompts for any threshold to pass; the message says how many are needed.
    """
    if prompts < guarantee.prompts_needed:
        raise UsageError(
            f"the guarantee cannot be met with {prompts} calibration prompts",
            expected=f"{guarantee.prompts_needed} or more for tolerance {guarantee.tolerance:g} "
            f"at confidence {guarantee.confidence:g}, even if skipping changes nothing",
            found=str(prompts),
            todo="give more calibration text, a larger tolerance or a lower confidence",
        )
    tested: list[Tested] = []
    for threshold in thresholds:
        risks = risks_at(threshold)
        assert risks.shape == (prompts,), "one risk per prompt"
        assert bool(((risks >= 0) & (risks <= 1)).all()), "risks are in [0, 1]"
        mean = float(risks.mean())
        p = p_value(mean, prompts, guarantee.tolerance)
        tested.append(Tested(threshold, mean, p, p <= 1 - guarantee.confidence))
        if not tested[-1].accepted:
            break
    return Outcome(guarantee, prompts, tuple(tested))


def agreement_risk(tokens: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Share of positions where the most likely next token is not the full model's: [n, S] int64 twice -> [n]."""
    return np.asarray((tokens != full).mean(axis=-1))


def loss_risk(nats: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Mean increase of the loss over the full model's, clipped to [0, 1]: nats of each token, [n, S] twice -> [n]."""
    return np.clip((nats - full).mean(axis=-1), 0.0, 1.0)
