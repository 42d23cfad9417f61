"""Choosing a token: the distribution after temperature, top-k and top-p, and greedy choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import UsageError
from engines.sampling import Sampling, distribution, pick

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05]))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(temperature=1, top_p=0.51), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=1, top_k=3, top_p=0.8), [0.625, 0.375, 0, 0]),
        (Sampling(temperature=0.5, top_k=2), [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
    ],
)
def test_distribution(sampling: Sampling, expected: list[float]) -> None:
    np.testing.assert_allclose(distribution(LOGITS, sampling), expected, atol=1e-9)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert pick(np.array([0.0, 2.0, 2.0]), Sampling(), np.random.default_rng(0)) == 1


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    st.floats(0.05, 3),
    st.integers(0, 50),
    st.floats(0.01, 1),
)
def test_distribution_is_one(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    found = distribution(np.array(logits, np.float32), Sampling(temperature, top_k, top_p))
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    assert found[int(np.argmax(logits))] > 0
    if top_k:
        assert np.count_nonzero(found) <= top_k


def test_seeds_repeat() -> None:
    draws = [
        [pick(LOGITS, Sampling(1.0, seed=5), rng) for _ in range(20)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    ]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
