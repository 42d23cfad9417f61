"""Learn then Test: p-values, the order of tests, and the guarantee itself in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsx_exporter.rules.calm.risk_control import RiskTarget, agreement_risk, fixed_sequence_test, loss_risk, p_value
from gsx_plugins.errors import UsageError

shares = st.floats(0.01, 0.99)


@given(mean=st.floats(0, 1), n=st.integers(1, 2000), delta=shares)
def test_p_value_is_a_p_value_and_never_above_hoeffding(mean: float, n: int, delta: float) -> None:
    p = p_value(mean, n, delta)
    hoeffding = math.exp(-2 * n * max(0.0, delta - mean) ** 2)
    assert 0 <= p <= min(1.0, hoeffding) * (1 + 1e-9)
    if mean >= delta:
        assert p == 1


@given(n=st.integers(1, 500), delta=shares, low=st.floats(0, 1), high=st.floats(0, 1))
def test_p_value_grows_with_the_risk(n: int, delta: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert p_value(low, n, delta) <= p_value(high, n, delta) * (1 + 1e-9)


@given(delta=shares, confidence=shares)
def test_prompts_needed_is_exact(delta: float, confidence: float) -> None:
    needed = RiskTarget(delta, confidence).prompts_needed
    slack = 1e-6  # a p-value that equals epsilon but for rounding
    assert p_value(0.0, needed, delta) <= (1 - confidence) * (1 + slack)
    if needed > 1:
        assert p_value(0.0, needed - 1, delta) > (1 - confidence) * (1 - slack)


def test_known_values() -> None:
    assert RiskTarget(0.1, 0.95).prompts_needed == 29  # 0.9^29 = 0.0471
    assert p_value(0.0, 29, 0.1) == pytest.approx(0.9**29)


@given(
    means=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    n=st.integers(30, 400),
    delta=st.floats(0.1, 0.5),
)
def test_the_walk_ends_at_the_first_failure(means: list[float], n: int, delta: float) -> None:
    asked: list[float] = []

    def risks(threshold: float) -> np.ndarray:
        asked.append(threshold)
        return np.full(n, means[round(threshold)])

    outcome = fixed_sequence_test(list(map(float, range(len(means)))), risks, n, RiskTarget(delta, 0.95))
    passes = [p_value(mean, n, delta) <= 0.05 for mean in means]
    first_failure = passes.index(False) if False in passes else len(passes)
    assert asked == list(map(float, range(min(first_failure + 1, len(means)))))
    assert outcome.threshold == (None if first_failure == 0 else float(first_failure - 1))


@pytest.mark.parametrize("correlated", [True, False])
@given(seed=st.integers(0, 3))
def test_the_guarantee_holds_in_simulation(correlated: bool, seed: int) -> None:
    """Thresholds whose true mean risk is just above delta are accepted in at most epsilon of many draws."""
    rng = np.random.default_rng(seed)
    delta, confidence, n, draws = 0.2, 0.9, 120, 400
    true_risks = np.array([0.05, 0.12, 0.2001, 0.2001, 0.2001, 0.4])
    wrong = 0
    for _ in range(draws):
        # One number per prompt for all thresholds, or one for each: the guarantee needs no independence between them.
        luck = rng.random((n, 1)) if correlated else rng.random((n, len(true_risks)))
        risks = (luck < true_risks).astype(float)
        outcome = fixed_sequence_test(
            range(len(true_risks)), lambda i, risks=risks: risks[:, int(i)], n, RiskTarget(delta, confidence)
        )
        wrong += outcome.threshold is not None and true_risks[int(outcome.threshold)] > delta
    # Four standard deviations of a share of 0.1 in 400 draws.
    assert wrong / draws <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / draws)


def test_too_few_prompts_are_refused_with_the_number_needed() -> None:
    with pytest.raises(UsageError, match="29 or more") as caught:
        fixed_sequence_test([1.0], lambda _: np.zeros(12), 12, RiskTarget(0.1, 0.95))
    assert "12" in str(caught.value)


@pytest.mark.parametrize("values", [(0.0, 0.9), (1.0, 0.9), (0.1, 1.0), (0.1, math.nan), (-1.0, 0.5)])
def test_a_guarantee_is_of_shares(values: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="of a guarantee"):
        RiskTarget(*values)


def test_risks() -> None:
    full, other = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[1, 2, 0, 0], [5, 6, 7, 8]])
    assert agreement_risk(other, full).tolist() == [0.5, 0.0]
    nats, more = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]), np.array([[1.5, 1.9], [0.5, 1.0], [9.0, 2.0]])
    assert loss_risk(more, nats).tolist() == pytest.approx([0.2, 0.0, 1.0])
