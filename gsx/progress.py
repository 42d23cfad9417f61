"""How long work tells how far it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A step of some work: what is going on, and how far it is (done of total; total 0: not known)."""

    stage: str
    done: int
    total: int
