"""Prompts that are read in pieces, and not where their beginning is there already: the text stays the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gsx
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.runners.select import open_runner
from gsx_engines.serving.cache_rows import LEAST_SHARED
from gsx_engines.serving.request import Finished, NewTokens, Request
from gsx_engines.serving.scheduler import Scheduler

PIECE = 7
BEGINNINGS = [np.random.default_rng(seed).integers(3, 250, 2 * LEAST_SHARED).tolist() for seed in range(2)]
# Policy -> what requests ask of it. Unified runs prompts in full, and calm the prompt and what its warm-up says.
POLICIES: dict[str, tuple[dict[str, Any], list[KeepSettings]]] = {
    "gates": ({}, [KeepSettings(), KeepSettings(budget=0.5)]),
    "gates, copied K/V": ({"kv_policy": "copy"}, [KeepSettings(), KeepSettings(budget=1.0)]),
    "sets": (
        {"policy": "unified:1.5", "budget": None, "calibration": None},
        [KeepSettings(), KeepSettings(layers="0,2")],
    ),
    "exits": (
        {"policy": "calm:threshold=0.02", "budget": None, "calibration": None},
        [KeepSettings(), KeepSettings(exit_threshold=0.0)],
    ),
    "ranks": ({"select": "rank"}, [KeepSettings()]),
}


@dataclass
class Recorder:
    ids: list[int] = field(default_factory=list)
    result: Finished | None = None
    turns: list[int] = field(default_factory=list)

    def tokens(self, new: NewTokens) -> None:
        self.ids += new.ids

    def finished(self, result: Finished) -> None:
        self.result = result

    def failed(self, error: Exception) -> None:
        raise error

    def is_gone(self) -> bool:
        return False

    def dropped(self) -> None:
        raise AssertionError("nobody left")


@pytest.fixture(scope="module", params=POLICIES)
def served(
    request: pytest.FixtureRequest, make_tiny_bundle: Callable[..., Path]
) -> tuple[Scheduler, list[KeepSettings], Callable[[list[int], KeepSettings], list[int]]]:
    """A scheduler, what may be asked of it, and the tokens of a request by itself."""
    options, keeps = POLICIES[request.param]
    bundle = open_bundle(make_tiny_bundle(**options))
    known: dict[tuple[tuple[int, ...], KeepSettings], list[int]] = {}

    def alone(prompt: list[int], keep: KeepSettings) -> list[int]:
        key = tuple(prompt), keep
        if key not in known:
            known[key] = gsx.generate(
                bundle,
                ids=prompt,
                max_new_tokens=6,
                budget=keep.budget,
                layers=keep.layers,
                exit_threshold=keep.exit_threshold,
                speculative=False,
                threads=1,
            ).ids
        return known[key]

    return Scheduler(open_runner(bundle, 1), slots=3, piece=PIECE), keeps, alone


def finish(scheduler: Scheduler) -> None:
    while scheduler.waiting or scheduler.under_way:
        scheduler.work()


# Beginning, how much of it, what follows (few tokens, so that prompts recur), the keep settings, turns until the next.
ARRIVALS = st.tuples(
    st.integers(0, 1), st.integers(1, 2 * LEAST_SHARED), st.integers(0, 3), st.integers(0, 1), st.integers(0, 4)
)


@settings(max_examples=15)
@given(st.lists(ARRIVALS, min_size=1, max_size=8))
def test_what_others_left_changes_no_token(served: Any, arrivals: list[tuple[int, int, int, int, int]]) -> None:
    scheduler, keeps, alone = served
    clients = []
    for beginning, size, rest, keep, turns in arrivals:
        prompt = [*BEGINNINGS[beginning][:size], *range(20, 20 + rest)]
        asked = keeps[keep % len(keeps)]
        client = Recorder()
        scheduler.submit(Request(prompt, 6, keep=asked), client)
        clients.append((prompt, asked, client))
        for _ in range(turns):
            scheduler.work()
    finish(scheduler)
    for prompt, asked, client in clients:
        assert client.ids == alone(prompt, asked)


def test_a_conversation_is_not_read_again(tiny_bundle: Path) -> None:
    """Its next turn reads only what is new, also when others had their turns in between; other budgets read it all."""
    scheduler = Scheduler(open_runner(open_bundle(tiny_bundle), 1), slots=3)

    def ask(prompt: list[int], **keep: float) -> tuple[list[int], int]:
        client = Recorder()
        scheduler.submit(Request(prompt, 4, keep=KeepSettings(**keep), stop_ids=frozenset()), client)
        finish(scheduler)
        assert client.result is not None
        return client.ids, client.result.cached_tokens

    first, second = BEGINNINGS
    answer, cached = ask(first)
    assert cached == 0
    assert ask(second)[1] == 0
    # The newest token of an answer was chosen, and not read.
    assert ask([*first, *answer, 30, 31])[1] == len(first) + len(answer) - 1
    assert ask([*second, 30])[1] == len(second)
    assert ask(second)[1] == len(second) - 1, "its last token is read, for its logits"
    assert ask([*first, 30], budget=0.5)[1] == 0
    assert ask([*first[: LEAST_SHARED - 1], 40])[1] == 0, "too few"


def test_a_long_prompt_is_read_between_the_steps_of_others(tiny_bundle: Path) -> None:
    scheduler = Scheduler(open_runner(open_bundle(tiny_bundle), 1), slots=2, piece=PIECE)
    running, long = Recorder(), Recorder()
    scheduler.submit(Request([5, 60], 30, stop_ids=frozenset()), running)
    scheduler.work()
    scheduler.submit(Request(BEGINNINGS[0], 3), long)
    pieces = -(-len(BEGINNINGS[0]) // PIECE)
    for turn in range(pieces):
        assert (len(running.ids), long.ids) == (2 + turn, [])
        scheduler.work()
    assert len(long.ids) == 2, "its last piece gives its first token, and the step of the same turn the next"
    finish(scheduler)
    assert long.result is not None
    assert long.result.stats.decode_steps == len(long.ids) - 1
