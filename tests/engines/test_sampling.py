"""Choosing a token: which ones remain after temperature, top-k and top-p, and how one of them is picked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from transformers import GenerationConfig
from transformers.generation import logits_process

from gsx_engines.errors import EngineError
from gsx_engines.sampling import Picker, Sampling, TokenLogprobs, adjusted, candidates, logprobs_of, noise
from gsx_plugins.errors import UsageError

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
# A fixed seed makes every draw below the same each time. A correct sampler would fail one such test in a million.
P_LEAST = 1e-6


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [V]."""
    ids, weights = candidates(logits, sampling)
    full = np.zeros(len(logits))
    full[ids] = weights
    return full


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


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=40),
    st.builds(
        Sampling,
        temperature=st.floats(0.05, 3),
        top_k=st.integers(0, 50),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.5, 2),
        logit_bias=st.dictionaries(st.integers(0, 3), st.floats(-5, 5)),
    ),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_processors_of_transformers(logits: list[float], sampling: Sampling, text: list[int]) -> None:
    """Bias, repetition, temperature, top-k, top-p and min-p in the order in which `generate` applies them there."""
    settings = GenerationConfig(
        do_sample=True,
        repetition_penalty=sampling.repetition_penalty,
        sequence_bias={(token,): bias for token, bias in sampling.logit_bias.items()} or None,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
    )
    scores, ids = torch.tensor([logits], dtype=torch.float64), torch.tensor([text])
    for process in processors_of(settings):
        scores = process(ids, scores)
    wanted = torch.softmax(scores[0], dim=-1).numpy()
    changed = adjusted(np.array(logits), sampling, text[:1], text[1:])
    found = distribution(changed, sampling)
    # A token whose probability is just at a cut may be on either side of it, by the last bits of a sum.
    full = distribution(changed, Sampling(sampling.temperature))
    order = np.sort(full)[::-1]
    close = np.abs(np.cumsum(order) / order[: sampling.top_k or None].sum() - sampling.top_p).min() < 1e-9
    ties = len(np.unique(np.round(changed, 9))) < len(changed)
    assume(not close and not ties and np.abs(full / full.max() - sampling.min_p).min() > 1e-9)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def processors_of(settings: GenerationConfig) -> list:
    """What transformers does to logits, in its order."""
    found: list = []
    if settings.sequence_bias:
        found.append(logits_process.SequenceBiasLogitsProcessor(settings.sequence_bias))
    if settings.repetition_penalty != 1:
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    found.append(logits_process.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(logits_process.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(logits_process.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        found.append(logits_process.MinPLogitsWarper(settings.min_p))
    return found


def test_penalties_for_new_tokens() -> None:
    """Frequency for each time, presence once; the prompt does not count."""
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    found = adjusted(np.zeros(4, np.float32), sampling, [0, 1, 1], [2, 3, 2, 2])
    np.testing.assert_array_equal(found, [0, 0, -1.75, -0.75])
    assert found.dtype == np.float32


def test_log_probabilities() -> None:
    """Of the model itself, and of equally likely tokens the earlier one first."""
    found = logprobs_of(np.array([1.0, 3.0, 2.0, 3.0], np.float32), 0, 3)
    wanted = torch.log_softmax(torch.tensor([1.0, 3.0, 2.0, 3.0], dtype=torch.float64), 0).tolist()
    assert found.logprob == pytest.approx(wanted[0], abs=1e-12)
    assert [token for token, _ in found.top] == [1, 3, 2]
    assert [logprob for _, logprob in found.top] == pytest.approx([wanted[1], wanted[3], wanted[2]], abs=1e-12)
    assert logprobs_of(np.array([0.0, -np.inf]), 0, 0) == TokenLogprobs(0.0, ())
    assert len(logprobs_of(np.array([0.0, 1.0]), 0, 20).top) == 2


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    assert Picker(Sampling()).pick(np.array([0.0, 2.0, 2.0]), 0, 0) == 1


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


def test_only_the_seed_the_sequence_and_the_position_decide() -> None:
    def draws(seed: int, sequence: int) -> list[int]:
        picker = Picker(Sampling(1.0, seed=seed))
        return [picker.pick(LOGITS, sequence, place) for place in range(40)]

    assert draws(5, 0) == draws(5, 0)
    assert draws(5, 0) != draws(6, 0)
    assert draws(5, 0) != draws(5, 1)
    assert Picker(Sampling(1.0, seed=5)).pick(LOGITS, 0, 17) == draws(5, 0)[17], "earlier draws leave no trace"


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.6), Sampling(1.3, top_k=3), Sampling(1.0, top_p=0.9)], ids=str
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling) -> None:
    """Chi-square over 20,000 positions, and over 20,000 seeds at one position."""
    wanted = distribution(LOGITS, sampling)
    over_places = Picker(Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=1))
    draws = [[over_places.pick(LOGITS, 0, place) for place in range(20_000)]]
    seeded = (Picker(Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=n)) for n in range(20_000))
    draws.append([picker.pick(LOGITS, 3, 7) for picker in seeded])
    for found in draws:
        counts = np.bincount(found, minlength=4)
        assert not counts[wanted == 0].any()
        possible = wanted > 0
        assert stats.chisquare(counts[possible], 20_000 * wanted[possible]).pvalue > P_LEAST


def test_noise_is_uniform_and_neighbours_are_independent() -> None:
    rows = np.stack([noise(key, np.arange(2000)) for key in range(50)])
    assert rows.min() > 0
    assert rows.max() < 1
    assert stats.kstest(rows.ravel(), "uniform").pvalue > P_LEAST
    for one, other in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1])):  # next token, next key
        assert stats.pearsonr(one.ravel(), other.ravel()).pvalue > P_LEAST


def test_picks_are_the_largest_scores() -> None:
    """The scores that `gsx verify` compares two picks by are those that decide, sampled and greedy."""
    for sampling in (Sampling(0.7, seed=3), Sampling()):
        picker = Picker(sampling)
        for place in range(200):
            logits = np.random.default_rng(place).standard_normal(50)
            assert picker.pick(logits, 2, place) == int(picker.scores(logits, 2, place).argmax())


@pytest.mark.parametrize("temperature", [1e-320, 1e-30])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert Picker(Sampling(temperature, seed=1)).pick(np.array([1.0, 3.0, 2.0]), 0, 0) == 1


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=30), st.integers(1, 30))
def test_of_equal_tokens_the_earlier_ones_stay(logits: list[float], top_k: int) -> None:
    ids, _ = candidates(np.array(logits), Sampling(1.0, top_k=top_k))
    order = np.argsort(-np.array(logits), kind="stable")[:top_k]
    np.testing.assert_array_equal(ids, order)


BAD = [
    ([1.0, math.nan, 3.0], "NaN"),
    ([1.0, math.inf, 3.0], "an infinite maximum"),
    ([-math.inf] * 3, "an infinite maximum"),
]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 2, 0.9, 1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("logits", "found"), BAD)
def test_no_token_is_chosen_by_such_logits(logits: list[float], found: str, sampling: Sampling) -> None:
    with pytest.raises(EngineError, match=f"no token can be chosen from .*\n  expected numbers with .*, found {found}"):
        Picker(sampling).pick(np.array(logits, np.float32), 0, 0)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=1)], ids=["greedy", "sampled"])
def test_a_token_may_be_ruled_out(sampling: Sampling) -> None:
    """Minus infinity is not an error as long as another token is possible."""
    assert Picker(sampling).pick(np.array([-np.inf, 2.0, -np.inf], np.float32), 0, 0) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1000},
        {"frequency_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"logit_bias": {3: 101}},
        {"logit_bias": {3: float("nan")}},
    ],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
