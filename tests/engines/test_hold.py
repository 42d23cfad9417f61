"""A budget that holds: the rule itself, and that it is the same in every way of decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.hold import BLOCK, Hold
from gsx_engines.bundle.selection import GridPoint, Selection
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import open_draft
from gsx_engines.speculation.spec import parse_draft

PROMPTS = [[5, 60, 61, 7, 8, 9], [11], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52]]
# New tokens whose last block ends in the middle.
TOKENS = 5 * BLOCK + 7
# The issue asks for this much after a few hundred tokens.
SHARE_ATOL = 0.02


@pytest.fixture(scope="module")
def gated(make_tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(make_tiny_bundle(draft="exit:2"))


@settings(max_examples=200)
@given(
    budget=st.integers(550, 950).map(lambda n: n / 1000),
    slope=st.floats(0.5, 2.0),
    kept_more=st.floats(-0.25, 0.25),
    noise=st.floats(0, 0.1),
    seed=st.integers(0, 2**31),
)
def test_the_share_meets_the_budget_on_other_text(
    budget: float, slope: float, kept_more: float, noise: float, seed: int
) -> None:
    """Text on which thresholds keep more or less than on the calibration text, as far as some setting can help it."""
    branches, generator = 60, np.random.default_rng(seed)

    def keeps(setting: float) -> float:
        return budget + slope * (setting - budget) + kept_more

    if not keeps(0.4) + 0.08 <= budget <= keeps(0.95) - 0.08:
        return  # what was kept at first could not be made up for
    points = ((budget, ((0.0, 0.0),)) for budget in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4))
    grid = tuple(GridPoint(budget=b, thresholds=t, kept_share=b, kept=((b, b),)) for b, t in points)
    hold = Hold(Selection(mode="threshold", budget=1.0, grid=grid), budget, branches)
    for _ in range(320):
        share = np.clip(keeps(hold.setting) + noise * generator.standard_normal(), 0, 1)
        hold.read(int(generator.binomial(branches, share)))
    assert abs(hold.kept / hold.gated - budget) <= SHARE_ATOL
    assert hold.setting in {round(hold.setting * 1000) / 1000}


def run(
    bundle: Bundle, keep: KeepSettings | list[KeepSettings], prompts: list[list[int]], **options: object
) -> Generation:
    return generate(
        options.pop("runner", None) or open_runner(bundle, 1),  # type: ignore[arg-type]
        prompts,
        **{"max_new_tokens": TOKENS, "stop_ids": [], "keep": keep, **options},  # type: ignore[arg-type]
    )


def held(made: Generation) -> tuple[object, int, int]:
    """All that must be the same however a text was decoded."""
    return made.sequences, made.stats.held_kept_rows, made.stats.held_gated_rows


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, seed=3)], ids=["greedy", "sampled"])
def test_any_way_of_decoding_gives_the_same(gated: Bundle, sampling: Sampling) -> None:
    """Alone, in a ragged batch of several budgets, without lowering, with every kind of draft, and in any length."""
    keep = [KeepSettings(budget=0.75, hold=True), KeepSettings(budget=0.6), KeepSettings(hold=True)]
    want = run(gated, keep, PROMPTS, sampling=sampling)
    others = [run(gated, keep, PROMPTS, sampling=sampling, runner=WholeRunner(PortableStage(gated, threads=1)))]
    for spec, length in (("exit:2", 3), ("exit:2", 15), ("budget:0.55", 4), ("layers:1.mlp", None)):
        draft = open_draft(gated, parse_draft(spec), 1)
        others.append(
            run(gated, keep, PROMPTS, sampling=sampling, runner=draft.runner, draft=draft, draft_length=length)
        )
        assert sum(others[-1].stats.drafted), spec
    for have in others:
        assert held(have) == held(want)
    assert want.stats.held_gated_rows == 2 * (TOKENS - 1) * len(gated.manifest.skippable_places), "one does not hold"
    if sampling == GREEDY:  # the noise of sampling depends on the sequence's number
        for prompt, one, found in zip(PROMPTS, keep, want.sequences, strict=True):
            assert run(gated, one, [prompt]).sequences == [found]


def test_the_budget_holds_where_thresholds_do_not(gated: Bundle) -> None:
    """Greedy text of a random model repeats itself: nothing like the calibration text."""
    for budget in (0.85, 0.7):
        fixed, keeps = (
            run(gated, KeepSettings(budget=budget, hold=hold), [PROMPTS[0]], max_new_tokens=200).stats
            for hold in (False, True)
        )
        assert keeps.held_share is not None
        assert abs(keeps.held_share - budget) <= SHARE_ATOL
        assert fixed.kept_share is not None
        assert abs(fixed.kept_share - budget) > SHARE_ATOL, "else the test shows nothing"


def test_tokens_are_counted_as_branches_are(gated: Bundle) -> None:
    """Every runner, with a ragged call: by branch, by sequence and by token."""
    from gsx_engines.bundle.controls import controls_for
    from gsx_engines.runners.select import open_split_runner

    ids = np.array([[5, 60, 61, 7], [11, 0, 0, 0], [8, 9, 0, 0]])
    counts = [4, 1, 2]
    controls = controls_for(gated.manifest, KeepSettings(budget=0.6), counts)
    outputs = []
    for runner in (open_runner(gated, 1), open_split_runner(gated, 1), WholeRunner(PortableStage(gated, threads=1))):
        output = runner.step(runner.new_cache(3, 8), ids, controls, counts=counts)
        assert output.kept is not None
        assert output.kept_by_token is not None
        assert output.kept_by_sequence is not None
        np.testing.assert_array_equal(output.kept_by_token.sum(axis=1), output.kept_by_sequence.sum(axis=(1, 2)))
        assert output.kept_by_token.sum() == output.kept.sum()
        assert not output.kept_by_token[np.arange(4) >= np.array(counts)[:, None]].any()
        outputs.append(output.kept_by_token)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert outputs[0].max() <= gated.manifest.decoder.num_layers * len(BRANCHES)
