"""Timing forms of a thing in turn, and ratios within a round.

Machines change their speed from minute to minute, so only ratios of times of the same moment mean anything: all forms
run once in each round, a ratio is taken within a round, and the median over the rounds is reported with the smallest
and the largest one. (pyperf runs each benchmark at a time of its own, so it cannot pair them.)

This module imports only the standard library: some benchmarks run where little else is installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def repeated(one_round: Callable[[], T], rounds: int, goes_on: Callable[[], bool] = lambda: True) -> list[T]:
    """The result of each round. One more round runs first and does not count: it loads code and memory.

    Args:
        rounds: how many at most.
        goes_on: asked after each round that counts, whether there may be another.
    """
    one_round()
    found = [one_round()]
    while len(found) < rounds and goes_on():
        found.append(one_round())
    return found


def in_turn(
    names: Iterable[str], run: Callable[[str], T], rounds: int, goes_on: Callable[[], bool] = lambda: True
) -> dict[str, list[T]]:
    """Run all forms once in each round.

    The order is reversed from round to round, since what runs before a form may slow it down.

    Args:
        names: the forms' names.
        run: runs one form, and returns its figures.
        rounds, goes_on: as for `repeated`.
    Returns: name -> what `run` returned, one entry per round; entries at the same index are of the same round.
    """
    forms = list(names)
    order = list(names)

    def one_round() -> dict[str, T]:
        order.reverse()
        return {name: run(name) for name in order}

    found = repeated(one_round, rounds, goes_on)
    return {name: [one[name] for one in found] for name in forms}


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values, one per round."""

    median: float
    least: float
    most: float

    def __format__(self, spec: str) -> str:
        """E.g. `f"{spread:.2f}"`: `1.20 (1.15 to 1.49)`, or only the median where all are equal."""
        if self.least == self.most:
            return format(self.median, spec)
        return f"{self.median:{spec}} ({self.least:{spec}} to {self.most:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of values, one per round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """The spread of `values` over `base`, each divided by the base's value of the same round."""
    return spread([value / one for value, one in zip(values, base, strict=True)])
