"""Picking from the likeliest tokens alone: the same token as from all logits, which are asked for only if they must."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.drafts import BudgetDraft
from gsx_engines.errors import EngineError
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.likeliest import Likeliest
from gsx_engines.lowering.for_tensorrt.likeliest import MOST_LIKELY
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import GREEDY, Picker, Sampling
from gsx_engines.speculation.draft import FullDepthDraft
from tests.engines.cpu_engine import CpuEngine
from tests.engines.test_steps import with_steps

PROMPT = [5, 60, 61, 7, 8, 9, 200, 11]


class Logits:
    """The likeliest `count` of some logits [V], of equal ones those that `seed` says, and how often all were read."""

    def __init__(self, logits: np.ndarray, count: int, seed: int = 0) -> None:
        self.logits, self.fetched = logits, 0
        shuffled = np.random.default_rng(seed).permutation(len(logits))
        ids = np.sort(shuffled[np.argsort(-logits[shuffled], kind="stable")][:count])
        with np.errstate(invalid="ignore"):
            total = float(np.exp(logits - logits.max()).sum())
        self.likeliest = Likeliest(ids, logits[ids], total, len(logits), self._whole)

    def _whole(self) -> np.ndarray:
        self.fetched += 1
        return self.logits


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.05, 0.6]),
    seed=st.integers(0, 2**64 - 1),
)


@given(
    st.lists(st.integers(-6, 6) | st.just(-math.inf), min_size=1, max_size=60),
    st.integers(1, 20),
    samplings,
    st.integers(0, 9),
)
def test_the_same_token(values: list[float], count: int, sampling: Sampling, seed: int) -> None:
    """With many equal logits, at the cut too, whichever of them the engine gives; and with tokens that are ruled out,
    as in a draft that chooses among few."""
    assume(max(values) > -math.inf)
    logits = Logits(np.array(values, np.float32) / 2, count, seed)
    picker = Picker(sampling)
    for place in range(3):
        assert picker.pick(logits.likeliest, 1, place) == picker.pick(logits.logits, 1, place)


@pytest.mark.parametrize(
    ("sampling", "whole"),
    [
        (GREEDY, False),
        (Sampling(1.0, top_k=50, seed=1), False),
        (Sampling(1.0, top_k=50, top_p=0.9, min_p=0.1, seed=1), False),
        (Sampling(0.7, min_p=0.1, seed=1), False),
        (Sampling(5.0, min_p=0.01, seed=1), True),
        (Sampling(1.0, top_k=MOST_LIKELY, seed=1), True),
        (Sampling(1.0, top_p=0.9, seed=1), True),
        (Sampling(1.0, seed=1), True),
    ],
    ids=str,
)
def test_all_are_asked_for_only_if_they_decide(sampling: Sampling, whole: bool) -> None:
    logits = Logits(np.random.default_rng(0).normal(0, 3, 4096).astype(np.float32), MOST_LIKELY)
    assert Picker(sampling).pick(logits.likeliest, 0, 7) == Picker(sampling).pick(logits.logits, 0, 7)
    assert logits.fetched == int(whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_is_found(bad: float) -> None:
    """Also where the engine does not count it among the likeliest."""
    logits = Logits(np.array([1.0, 3.0, bad, 2.0], np.float32), 1)
    few = Likeliest(np.array([1]), np.array([3.0], np.float32), logits.likeliest.total, 4, logits.likeliest.whole)
    with pytest.raises(EngineError, match="no token can be chosen"):
        Picker(GREEDY).pick(few, 0, 0)


def test_confidence_of_a_draft() -> None:
    logits = Logits(np.random.default_rng(0).normal(0, 3, 4096).astype(np.float32), MOST_LIKELY)
    picker = Picker(GREEDY)
    assert picker.confidence(logits.likeliest) == pytest.approx(picker.confidence(logits.logits), rel=1e-6)


REQUESTS = {
    "greedy": (GREEDY, None, False),
    "top-k": (Sampling(1.2, top_k=20, seed=4), None, False),
    "all of them": (Sampling(1.2, seed=4), None, True),
    "penalties": (Sampling(repetition_penalty=1.3), None, True),
    "log-probabilities": (GREEDY, 2, True),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "draft"])
def test_text_of_steps(
    make_tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, drafts: bool
) -> None:
    """The text of the portable runner, from steps that give their likeliest tokens."""
    bundle = open_bundle(make_tiny_bundle())
    sampling, logprobs, whole = REQUESTS[name]
    reads = []
    own = CpuEngine.read
    monkeypatch.setattr(CpuEngine, "read", lambda *given: reads.append(1) or own(*given))
    stage, _, (one, several) = with_steps(bundle, 1, (1, 1), (1, 3), plugins=())

    def text(runner: WholeRunner) -> Generation:
        draft = FullDepthDraft(runner, BudgetDraft(budget=0.5)) if drafts else None
        options = {"sampling": sampling, "logprobs": logprobs, "draft": draft, "draft_length": 2 if drafts else None}
        return generate(runner, [PROMPT], max_new_tokens=24, stop_ids=[], **options)

    found, want = text(WholeRunner(stage)), text(WholeRunner(PortableStage(bundle)))
    assert found.sequences[0].tokens == want.sequences[0].tokens
    assert one.calls
    assert bool(several.calls) is drafts
    assert bool(reads) is whole
