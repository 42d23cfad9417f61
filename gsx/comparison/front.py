"""The Pareto front of what was measured: what nothing else beats in both quality and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def front(points: Sequence[T], loss: Callable[[T], float], seconds: Callable[[T], float]) -> list[T]:
    """The points for which no other one is as good in both and better in one, from the slowest to the fastest.

    Args: loss, seconds: of a point; less is better.
    """
    best: list[T] = []
    for point in sorted(points, key=lambda one: (loss(one), seconds(one))):
        if not best or seconds(point) < seconds(best[-1]):
            best.append(point)
    return best
