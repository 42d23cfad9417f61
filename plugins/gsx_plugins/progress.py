"""Reporting the progress of long work: one shape of callback for every floor, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """A step of some work.

    Args:
        stage: what is going on, in a few words.
        done: how many steps of the stage are done.
        total: how many steps the stage has; 0 if unknown.
        note: a remark for people who watch.
        share: of the whole work, of which this is a stage, the share that is done; None if unknown.
        unit: what `done` and `total` count.
    """

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    share: float | None = None
    unit: Literal["steps", "bytes"] = "steps"


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignore progress: the default of every function that reports it."""


def prefixed(on_progress: OnProgress, prefix: str) -> OnProgress:
    """A callback that puts `prefix: ` before the stage of every report."""
    return lambda progress: on_progress(replace(progress, stage=f"{prefix}: {progress.stage}"))


def as_step(on_progress: OnProgress, step: Progress) -> OnProgress:
    """A callback that passes every report from inside a step on as the step itself, which is still going on."""
    return lambda _: on_progress(step)


# Before so many seconds, and before so much of the work is done, an estimate would be a guess.
_FIRST_SECONDS, _FIRST_SHARE = 5.0, 0.02


class TimeLeft:
    """Estimates the time left from reports: of the whole work where its share is reported, else of the stage.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: str | None = None
        self._start = (0.0, 0.0)

    def after(self, progress: Progress) -> float | None:
        """Seconds left after a report; None if too little is known, or nothing is left of what is reported."""
        of, share = progress.stage, progress.done / progress.total if progress.total else None
        if progress.share is not None:
            of, share = "", progress.share
        if share is None or share >= 1:
            return None
        now = self._clock()
        if of != self._of:
            self._of, self._start = of, (now, share)
        began, before = self._start
        if now - began < _FIRST_SECONDS or share - before < _FIRST_SHARE:
            return None
        return (now - began) * (1 - share) / (share - before)


def in_words(seconds: float) -> str:
    """A duration as people say it: `40 s`, `3 min`, `1 h 20 min`."""
    if round(seconds) < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
