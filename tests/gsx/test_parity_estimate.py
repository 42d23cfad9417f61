"""Confidence intervals: they hold the true mean as often as they say, and decide limits as documented."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsx.parity.estimate import BLOCK_TOKENS, CONFIDENCE, Estimate, mean_of, share_of

# Of 200 intervals of 95 %, 95 % +- 4 standard errors of 1.5 % hold the true mean.
TRIALS, ALLOWED = 200, 0.06


def _runs(rng: np.random.Generator, windows: int, tokens: int, run: int) -> list[np.ndarray]:
    """Values with mean 1 and heavy tails, of which `run` neighbours are equal: tokens go wrong together."""
    return [np.repeat(rng.lognormal(-0.5, 1.0, tokens // run), run) for _ in range(windows)]


@pytest.mark.parametrize(("windows", "tokens", "run"), [(8, 512, 1), (8, 512, 8), (2, 512, 1)])
def test_the_interval_holds_the_mean(windows: int, tokens: int, run: int) -> None:
    rng = np.random.default_rng(0)
    found = [mean_of(_runs(rng, windows, tokens, run)) for _ in range(TRIALS)]
    held = np.mean([one.low <= 1 <= one.high for one in found])
    assert held == pytest.approx(CONFIDENCE, abs=ALLOWED)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_the_interval_holds_the_share(share: float) -> None:
    rng = np.random.default_rng(0)
    found = [share_of([rng.random(512) < share for _ in range(2)]) for _ in range(TRIALS)]
    assert np.mean([one.low <= share <= one.high for one in found]) >= CONFIDENCE - ALLOWED
    assert all(0 <= one.low < one.high <= 1 for one in found), "nothing seen is not nothing there"


@given(
    sizes=st.lists(st.integers(1, 3 * BLOCK_TOKENS), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_value_is_the_plain_mean(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    windows = [rng.standard_normal(size) for size in sizes]
    found = mean_of(windows)
    assert found.value == pytest.approx(np.concatenate(windows).mean())
    assert found.low <= found.value <= found.high
    assert found.tokens == sum(sizes)


@pytest.mark.parametrize("values", [[np.ones(BLOCK_TOKENS)], [np.array([1.0, np.nan] * 64)], [np.full(256, np.inf)]])
def test_one_block_or_no_number_decides_nothing(values: list[np.ndarray]) -> None:
    found = mean_of(values)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.decides(1e9)
    assert found.tokens_needed(1e9) is None


@pytest.mark.parametrize(
    ("estimate", "limit", "decides", "needed"),
    [
        (Estimate(0.5, 0.4, 0.6, 1000), 1.0, True, 40),  # far less would have done
        (Estimate(0.0, -1.0, 1.0, 1000), 1.0, True, 1000),
        (Estimate(0.5, -0.5, 1.5, 1000), 1.0, False, 4000),  # half the width takes four times the tokens
        (Estimate(-0.5, -1.5, 0.5, 1000), 1.0, False, 4000),
        (Estimate(0.0, -2.0, 2.0, 1000), 1.0, False, 4000),
        (Estimate(0.999999, 0.0, 2.0, 1000), 1.0, False, 4000),  # near the limit, the width decides
        (Estimate(0.999999, 0.5, 1.5, 1000), 1.0, True, 1000),
        (Estimate(0.0, -1.0, 1.0, 1000), 0.0, False, None),
        (Estimate(0.0, -1.0, 1.0, 1000), 1e-6, False, None),
    ],
)
def test_what_decides_a_limit(estimate: Estimate, limit: float, decides: bool, needed: int | None) -> None:
    assert estimate.decides(limit) is decides
    assert estimate.tokens_needed(limit) == needed
