"""Thresholds: the share that they keep, and their distance from the scores that they part."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.calibration import threshold_for

# Half of the gap that a threshold must have around it: rounding moves a score by about 1e-7.
CLEARANCE = 1e-6


def kept(scores: np.ndarray, tau: np.float32) -> float:
    return float((scores > tau).mean())


@pytest.mark.parametrize("share", [0.95, 0.85, 0.7, 0.5, 0.3, 0.05])
def test_share_is_met_away_from_any_score(share: float) -> None:
    scores = np.random.default_rng(0).normal(0.5, 0.05, 4096).astype(np.float32)
    tau = threshold_for(scores, share)
    assert kept(scores, tau) == pytest.approx(share, abs=0.003)
    assert np.abs(scores - tau).min() > CLEARANCE


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_equal_scores_stay_together_also_when_rounded_differently(share: float) -> None:
    rng = np.random.default_rng(1)
    tokens = np.repeat(rng.uniform(0.4, 0.6, 40), 50)
    scores = (tokens + rng.normal(0, 3e-8, tokens.size)).astype(np.float32)
    tau = threshold_for(scores, share)
    assert np.abs(scores - tau).min() > CLEARANCE
    # 40 distinct scores: the nearest share is at most half of 1/40 away.
    assert kept(scores, tau) == pytest.approx(share, abs=0.5 / 40 + 1e-9)


def test_a_share_that_cannot_be_met_keeps_all_or_none() -> None:
    scores = np.full(10, 0.5, np.float32)
    assert kept(scores, threshold_for(scores, 0.9)) == 1
    assert kept(scores, threshold_for(scores, 0.1)) == 0


@pytest.mark.parametrize(("share", "want"), [(1.0, 1.0), (0.0, 0.0), (1.2, 1.0), (-0.2, 0.0)])
def test_the_ends_keep_all_or_none(share: float, want: float) -> None:
    scores = np.random.default_rng(2).uniform(0.4, 0.6, 100).astype(np.float32)
    assert kept(scores, threshold_for(scores, share)) == want
