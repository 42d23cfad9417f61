"""Trying skip sets on generated text: the same counts as real drafting, and the search that uses them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from gsx.workflows.skip_set_search import search_skip_sets
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.bundle.cost import step_bytes
from gsx_engines.bundle.drafts import LayersDraft
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.draft_trials.replay import Replay
from gsx_engines.generation.generate import generate
from gsx_engines.runners.select import open_runner
from gsx_engines.sampling import Sampling
from gsx_engines.speculation import adapt
from gsx_engines.speculation.adapt import WINDOW, SkipSetSearch, first_set, in_a_row
from gsx_engines.speculation.draft import FullDepthDraft
from gsx_engines.speculation.length import CHUNK, ROW_COST, counted_speed
from gsx_engines.speculation.spec import parse_draft
from gsx_plugins.progress import Progress

PROMPTS = [[5, 60, 61, 7, 8, 9, 200, 11], [61, 7, 33]]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def drafted_right(bundle: Bundle, draft: LayersDraft, prompt: list[int]) -> int:
    """Number of consecutive tokens that a draft gets right after the first new token, by drafting them."""
    runner = open_runner(bundle)
    controls = controls_for(bundle.manifest)
    written = generate(runner, [prompt], max_new_tokens=CHUNK + 1, stop_ids=[]).sequences[0].tokens
    drafts = FullDepthDraft(runner, draft)
    cache = runner.new_cache(1, 64)
    runner.step(cache, np.array([prompt]), controls)
    for count in range(CHUNK):
        guess = drafts.step(cache, np.array([[written[count]]]), controls, [1]).logits.argmax()
        if guess != written[count + 1]:
            return count
    return CHUNK


@pytest.mark.parametrize("draft", ["layers:1", "layers:0.mlp,2.attn", "layers:1.attn", "layers:2.mlp"])
def test_a_place_counts_what_drafting_there_gets_right(bundle: Bundle, draft: str) -> None:
    parsed = parse_draft(draft)
    assert isinstance(parsed, LayersDraft)
    for prompt in PROMPTS:
        replay = Replay(open_runner(bundle), [prompt], CHUNK + 1)
        assert replay.accepted(parsed).tolist() == [drafted_right(bundle, parsed, prompt)]


def test_the_model_agrees_with_itself_and_trying_leaves_no_trace(bundle: Bundle) -> None:
    replay = Replay(open_runner(bundle), PROMPTS, 4 * CHUNK)
    own = LayersDraft(skip=())
    nothing = LayersDraft(skip=tuple((layer, branch) for layer in range(3) for branch in BRANCHES))
    first = replay.accepted(nothing)
    assert len(first) == 2 * 3  # the last token has no next token to compare with
    assert first.min() < CHUNK
    assert (replay.accepted(own) == CHUNK).all()
    assert replay.accepted(nothing).tolist() == first.tolist()


@given(st.lists(st.integers(0, CHUNK), min_size=1), st.floats(0.01, 1))
def test_counted_speed_is_that_of_the_best_length(accepted: list[int], share: float) -> None:
    speed, length = counted_speed(np.array(accepted), share)
    for other in range(1, CHUNK + 1):
        tokens = 1 + sum(min(a, other) for a in accepted) / len(accepted)
        assert tokens / (1 + other * (share + ROW_COST)) <= speed * (1 + 1e-12)
    assert 1 <= length <= CHUNK


def test_bytes_are_those_of_the_checkpoint(bundle: Bundle, tiny_gated: Path) -> None:
    cost = step_bytes(bundle)
    with safe_open(tiny_gated / "model.safetensors", "pt") as file:
        sizes = {name: 4 * file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    attention = sum(sizes[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qo")
    mlp = sum(size for name, size in sizes.items() if name.startswith("model.layers.1.mlp."))
    assert cost.branches[1].tolist() == [attention, mlp]
    read = sum(sizes.values()) - sizes["model.embed_tokens.weight"]
    # The graph's small constants come in addition.
    assert read <= cost.branches.sum() + cost.rest < read + 1000
    none = np.zeros_like(cost.branches, bool)
    assert cost.share(~none) == 1
    assert cost.share(none) == pytest.approx(cost.rest / read, rel=0.01)


def test_the_search_is_repeatable_and_ranks_by_what_it_counts(bundle: Bundle) -> None:
    replay = Replay(open_runner(bundle), PROMPTS, 2 * CHUNK + 1)
    layers, cost = bundle.manifest.decoder.num_layers, step_bytes(bundle)
    seen: list[Progress] = []
    first, second = (search_skip_sets(replay, layers, BRANCHES, cost, seen.append, trials=15) for _ in range(2))
    assert first == second
    assert seen == [Progress("searching skip sets", n, 15) for n in range(1, 16)] * 2
    assert [one.speed for one in first] == sorted((one.speed for one in first), reverse=True)
    assert len({one.draft for one in first}) == len(first) > 3
    for one in first:
        run = np.ones((layers, len(BRANCHES)), bool)
        for layer, branch in one.draft.skip:
            run[layer, BRANCHES.index(branch)] = False
        accepted = replay.accepted(one.draft)
        assert (one.speed, one.length) == counted_speed(accepted, cost.share(run))


places = st.tuples(st.integers(0, 12), st.sampled_from(BRANCHES))


@given(st.sets(places, min_size=1))
def test_a_set_reads_as_it_is_written(skip: set[tuple[int, Branch]]) -> None:
    draft = LayersDraft(skip=tuple(sorted(skip)))
    found = parse_draft(str(draft))
    assert isinstance(found, LayersDraft)
    assert set(found.skip) == skip


def test_a_set_is_written_short() -> None:
    text = "layers:0,2-4,5.attn,7-8.mlp"
    assert str(parse_draft(text)) == text


def test_tokens_in_a_row_are_counted_from_each_place() -> None:
    right = np.ones((2, CHUNK + 2), bool)
    right[1, [0, 3]] = False
    assert in_a_row(right).tolist() == [[CHUNK] * 3, [0, 2, 1]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "sampled"])
def test_a_set_that_changes_meanwhile_leaves_the_text_alone(bundle: Bundle, sampling: Sampling) -> None:
    """Tries sets after every other round, in batches too: the same tokens as plain decoding, and the same cache."""
    plain = open_runner(bundle)
    options: dict[str, Any] = {"max_new_tokens": 120, "stop_ids": [], "sampling": sampling}
    prompts = [list(np.random.default_rng(0).integers(3, 250, length)) for length in (WINDOW + 4, 5)]
    for some in (prompts[:1], prompts):
        drafting = FullDepthDraft(open_runner(bundle), first_set(bundle.manifest))
        search = SkipSetSearch(drafting, step_bytes(bundle))
        found = generate(drafting.runner, some, draft=drafting, draft_length=3, search=search, **options)
        assert found.sequences == generate(plain, some, **options).sequences
        assert 0 < search.found.looks <= search.found.tried
        assert found.stats.search_seconds > 0
        assert search.found.changes == 0 or drafting.kind != first_set(bundle.manifest)


def test_a_search_finds_what_was_hidden_and_ends(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """If branches are equally good, fewer bytes win; a search that finds nothing more costs nothing more."""
    monkeypatch.setattr(adapt, "in_a_row", lambda right: np.full(4, CHUNK))
    drafting = FullDepthDraft(open_runner(bundle), parse_draft("layers:1.attn"))
    search = SkipSetSearch(drafting, step_bytes(bundle))
    prompt = list(np.random.default_rng(0).integers(3, 250, WINDOW + 4))
    generate(drafting.runner, [prompt], max_new_tokens=400, stop_ids=[], draft=drafting, draft_length=1, search=search)
    assert search.found.ended
    assert isinstance(drafting.kind, LayersDraft)
    assert len(drafting.kind.skip) == len(bundle.manifest.skippable_places) - 1, "one branch stays"
    assert search.found.looks < 400 / 2 / adapt.EVERY


def test_the_first_set_leaves_the_ends_in() -> None:
    manifest = SimpleNamespace(skippable_places=[(n, b) for n in range(12) for b in BRANCHES])
    manifest.decoder = SimpleNamespace(num_layers=12)
    places = first_set(cast(Manifest, manifest)).skip
    assert {layer for layer, _ in places}.isdisjoint({0, 11})
    assert len(places) == int(0.45 * 20)
