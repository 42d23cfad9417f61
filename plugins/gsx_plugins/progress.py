"""How long work reports how far it is: one shape of callback for every floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """A step of some work.

    Args:
        stage: what is going on, in a few words.
        done: steps of the stage that are done.
        total: steps of the stage; 0 if not known.
        note: a remark for a person who watches.
    """

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report to nobody: the default of every function that reports progress."""


def prefixed(on_progress: OnProgress, prefix: str) -> OnProgress:
    """Reports whose stage begins with `prefix: `."""
    return lambda progress: on_progress(replace(progress, stage=f"{prefix}: {progress.stage}"))


def as_step(on_progress: OnProgress, step: Progress) -> OnProgress:
    """Every report of a part of a step is passed on as the step itself: it goes on, and it is no further."""
    return lambda _: on_progress(step)
