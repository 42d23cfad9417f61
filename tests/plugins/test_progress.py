"""Passing on the progress of a part of some work."""

from __future__ import annotations

from gsx_plugins.progress import Progress, as_step, prefixed


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
