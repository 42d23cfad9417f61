"""Choosing a threshold with a guarantee: fixed-sequence testing of Learn then Test, as CALM calibrates its exits.

A risk is a number in [0, 1] that each prompt has at each threshold: how far leaving work out moves the model from
what it would have done (`agreement_risk`, `loss_risk`). Wanted is the boldest threshold whose mean risk, over all
prompts of the kind that was calibrated on, is at most a tolerance delta, and a promise that this is so with
probability 1 - epsilon over the draw of the prompts.

Thresholds are walked from the most careful to the boldest. At each one the hypothesis "the mean risk is above delta"
is tested at level epsilon; the walk ends where it is not rejected, and the last rejected one is taken. Because the
order is fixed before the risks are seen, the chance to take any threshold whose mean risk is above delta is at most
epsilon, however many are tried.

Rule: CALM (2207.07061), calibration by fixed-sequence testing; Learn then Test (2110.01052), the Hoeffding-Bentkus
p-value, which is never above CALM's exp(-2 n (delta - mean)^2): both hold for any risk in [0, 1], this one needs
fewer prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binom

from gsx_plugins.errors import UsageError

# Of next tokens that differ from the whole model's, or of its loss.
Risk = Literal["agreement", "loss"]


@dataclass(frozen=True)
class RiskTarget:
    """What is promised: the mean risk is at most `tolerance`, with probability `confidence`.

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
        """Fewest prompts that can give the guarantee: with fewer, not even a risk of 0 on all of them does."""
        # p-value of risk 0 with n prompts: (1 - tolerance)^n.
        exact = math.log1p(-self.confidence) / math.log1p(-self.tolerance)
        return max(1, math.ceil(exact - 1e-9))


@dataclass(frozen=True)
class Tested:
    """One threshold of the walk: mean risk over the prompts, p-value, whether "risk above tolerance" was rejected."""

    threshold: float
    mean_risk: float
    p_value: float
    accepted: bool


@dataclass(frozen=True)
class Outcome:
    """What the walk found.

    Args:
        guarantee: as asked for.
        prompts: n.
        tested: thresholds in the order of the walk; all are accepted but, at most, the last.
    """

    guarantee: RiskTarget
    prompts: int
    tested: tuple[Tested, ...]

    @property
    def threshold(self) -> float | None:
        """The boldest threshold that holds the guarantee; None where none does."""
        accepted = [one.threshold for one in self.tested if one.accepted]
        return accepted[-1] if accepted else None


def p_value(mean_risk: float, prompts: int, tolerance: float) -> float:
    """p-value of "the mean risk is above the tolerance": Hoeffding-Bentkus, for risks in [0, 1].

    Args:
        mean_risk: over the prompts.
        prompts: n, independent draws.
    Rule: 2110.01052, the smaller of exp(-n KL(min(mean, delta), delta)) and e P(Bin(n, delta) <= ceil(n mean)).
    """
    if mean_risk >= tolerance:
        return 1.0
    divergence = (1 - mean_risk) * math.log((1 - mean_risk) / (1 - tolerance))
    if mean_risk > 0:
        divergence += mean_risk * math.log(mean_risk / tolerance)
    # A product that floating point made a little too large must not count as one failure more.
    failures = math.ceil(round(prompts * mean_risk, 9))
    bentkus = math.e * float(binom.cdf(failures, prompts, tolerance))
    return min(math.exp(-prompts * divergence), bentkus, 1.0)


def fixed_sequence_test(
    thresholds: Sequence[float], risks_at: Callable[[float], np.ndarray], prompts: int, guarantee: RiskTarget
) -> Outcome:
    """Walk thresholds from the most careful to the boldest while the guarantee holds.

    Args:
        thresholds: in that order, chosen without a look at the risks.
        risks_at: threshold -> [n] risk of each prompt, in [0, 1]; called for no threshold behind the first failure.
        prompts: n.
    Raises:
        UsageError: too few prompts for any threshold to pass; the text says how many are needed.
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
        assert risks.shape == (prompts,), "one risk a prompt"
        assert bool(((risks >= 0) & (risks <= 1)).all()), "risks lie in [0, 1]"
        mean = float(risks.mean())
        p = p_value(mean, prompts, guarantee.tolerance)
        tested.append(Tested(threshold, mean, p, p <= 1 - guarantee.confidence))
        if not tested[-1].accepted:
            break
    return Outcome(guarantee, prompts, tuple(tested))


def agreement_risk(choices: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Share of places where the most likely next token is not the full model's: [n, S] int64 twice -> [n]."""
    return np.asarray((choices != full).mean(axis=-1))


def loss_risk(nats: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Mean loss above the full model's, not below 0 nor above 1: nats of each token, [n, S] twice -> [n]."""
    return np.clip((nats - full).mean(axis=-1), 0.0, 1.0)
