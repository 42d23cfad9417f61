"""Passing on the progress of a part of some work, and the time left."""

from __future__ import annotations

import pytest

from gsx_plugins.progress import Progress, TimeLeft, as_step, in_words, prefixed


def test_a_part_is_shown_under_a_name_of_its_own() -> None:
    seen: list[Progress] = []
    prefixed(seen.append, "calm")(Progress("timing", 2, 5, "slow"))
    assert seen == [Progress("calm: timing", 2, 5, "slow")]


def test_a_part_is_shown_as_the_step_that_it_belongs_to() -> None:
    seen: list[Progress] = []
    step = Progress("measuring drafts", 1, 3)
    report = as_step(seen.append, step)
    report(Progress("measuring the draft", 1, 2))
    report(Progress("measuring the draft", 2, 2))
    assert seen == [step, step]


@pytest.mark.parametrize(
    ("reports", "left"),
    [
        ([(0, Progress("a", 0, 10)), (20, Progress("a", 2, 10))], 80),
        ([(0, Progress("a", 5, 10)), (20, Progress("a", 6, 10))], 80),  # from where it was first seen
        ([(0, Progress("a", 0, 10)), (1, Progress("a", 2, 10))], None),  # too early
        ([(0, Progress("a", 0, 1000)), (20, Progress("a", 1, 1000))], None),  # too little
        ([(0, Progress("a")), (20, Progress("a"))], None),  # unknown
        ([(0, Progress("a", 0, 10)), (20, Progress("a", 10, 10))], None),  # done: what comes next is not known
        ([(0, Progress("a", 0, 10)), (20, Progress("b", 2, 10))], None),  # another stage
        # The share of the whole work counts, whatever its stages are.
        ([(0, Progress("a", 0, 10, share=0.0)), (30, Progress("b", 1, 2, share=0.25))], 90),
    ],
)
def test_the_time_left(reports: list[tuple[float, Progress]], left: float | None) -> None:
    now = 0.0
    estimate = TimeLeft(lambda: now)
    found = None
    for now, progress in reports:  # noqa: B007  # the clock reads it
        found = estimate.after(progress)
    assert found == (None if left is None else pytest.approx(left))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (5000, "1 h 23 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
