"""Reporting the progress of long work: one shape of callback for every floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """A step of some work.

    Args:
        stage: what is going on, in a few words.
        done: how many steps of the stage are done.
        total: how many steps the stage has; 0 if unknown.
        note: a remark for people who watch.
        share: of the whole work, of which this is a stage, the share that is done; None if unknown.
    """

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    share: float | None = None


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignore progress: the default of every function that reports it."""


def prefixed(on_progress: OnProgress, prefix: str) -> OnProgress:
    """A callback that puts `prefix: ` before the stage of every report."""
    return lambda progress: on_progress(replace(progress, stage=f"{prefix}: {progress.stage}"))


def as_step(on_progress: OnProgress, step: Progress) -> OnProgress:
    """A callback that passes every report from inside a step on as the step itself, which is still going on."""
    return lambda _: on_progress(step)
