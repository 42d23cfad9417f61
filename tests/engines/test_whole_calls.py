"""Sets of layers on engines: the host gives the number of rows of each branch, on a CPU against the portable runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, controls_for
from gsx_engines.generation.generate import generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.speculation.draft import EarlyExitDraft
from tests.engines.cpu_engine import cpu_stages, equal_steps

# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
CAPACITY = 160
PROMPTS = [[5, 60, 61, 7, 8, 9, 200, 11], [61, 7], [5, 60, 61, 7, 8, 9, 200, 11, 30, 31, 32]]
SETS = [KeepSettings(layers=text) for text in ("0,2", "0-2", "0,1.mlp")]


@pytest.fixture(params=["none", "copy", "compute"])
def sets(request: pytest.FixtureRequest, make_tiny_bundle: Callable[..., Path]) -> Bundle:
    options = {"policy": "layers", "budget": None, "calibration": None, "kv_policy": request.param}
    return open_bundle(make_tiny_bundle(**options))


def check(bundle: Bundle, controls: RuntimeValues, sizes: list[tuple[int, ...]]) -> None:
    """Logits and kept rows of calls with so many tokens of each sequence."""
    batch = len(sizes[0])
    stage, _ = cpu_stages(bundle, default_profiles(CAPACITY, batch), capacity=CAPACITY)["model"]
    for found in equal_steps(bundle, stage, controls, sizes, CAPACITY, LOGITS_ATOL):
        assert found.kept_by_sequence is not None
        np.testing.assert_array_equal(found.kept_by_sequence.sum(axis=0), found.kept)


def test_one_sequence(sets: Bundle) -> None:
    for keep in SETS:
        check(sets, controls_for(sets.manifest, keep), [(9,), (1,), (3,), (1,)])


def test_sequences_with_sets_of_their_own(sets: Bundle) -> None:
    """Also where neighbours share one, where some have nothing to do, and where one has far more tokens."""
    for keeps in (SETS, [SETS[0], SETS[0], SETS[2]]):
        controls = controls_for(sets.manifest, keeps)
        check(sets, controls, [(9, 2, 40), (1, 1, 1), (0, 1, 1), (3, 0, 1), (1, 2, 3)])


def test_tokens_that_run_every_branch(sets: Bundle) -> None:
    """A call may begin before `full_until` and end after it."""
    values = {**controls_for(sets.manifest, SETS), "full_until": np.array([4, 0, 20])}
    check(sets, values, [(3, 2, 7), (3, 1, 12), (1, 1, 5), (1, 1, 1)])


def test_the_engine_asks_for_no_decision(sets: Bundle) -> None:
    stages = cpu_stages(sets, default_profiles(CAPACITY, 1), capacity=CAPACITY, plugins=["ThresholdGather"])
    stage, engine = stages["model"]
    graph = stage._entry.graphs["model"]
    assert graph.forms == {"ThresholdGather": "rows", "GatheredAttention": "all", "GatedScatterAdd": "rows"}
    names = {value.name for value in graph.inputs}
    layers = range(sets.manifest.decoder.num_layers)
    assert {f"run.{layer}.{branch}" for layer in layers for branch in ("attn", "mlp")} <= names
    assert not names & {"layer_mask", "full_until"}
    generate(WholeRunner(stage), PROMPTS[:1], max_new_tokens=3, keep=SETS[0])
    assert all("run.0.mlp" not in shapes for _, shapes in engine.calls), "nothing is copied for what nobody reads"


def test_text_with_drafts(make_tiny_bundle: Callable[..., Path]) -> None:
    """An exit as a draft, and its verification by the other layers."""
    bundle = open_bundle(make_tiny_bundle(policy="layers", budget=None, calibration=None, draft="exit:1"))
    stages = cpu_stages(bundle, default_profiles(CAPACITY, 3), capacity=CAPACITY)
    draft = EarlyExitDraft(SplitRunner(stages["draft"][0], stages["verify"][0]))
    for keep in SETS:
        plain = generate(WholeRunner(PortableStage(bundle)), PROMPTS, max_new_tokens=20, keep=keep)
        found = generate(draft.runner, PROMPTS, max_new_tokens=20, draft=draft, draft_length=3, keep=keep)
        assert found.sequences == plain.sequences
