"""Measures of confidence at an exit (policy `calm`), and their ranges."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from gsx_plugins.errors import UsageError

Measure = Literal["softmax", "state", "classifier"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Range(NamedTuple):
    """Smallest and largest value of a measure."""

    least: float
    most: float


RANGES: dict[Measure, Range] = {
    "softmax": Range(0.0, 1.0),
    "state": Range(-1.0, 1.0),
    "classifier": Range(0.0, 1.0),
}


def check_threshold(threshold: float, least: float, most: float) -> None:
    """Refuse a threshold outside the range of its measure; plus infinity, at which no token exits, is allowed.

    Raises:
        UsageError: the threshold is outside the range.
    """
    if threshold != math.inf and not least <= threshold <= most:
        raise UsageError(
            "the exit threshold is outside the range of the confidence measure",
            expected=f"{least:g} to {most:g}, or inf for no exits",
            found=f"{threshold:g}",
        )
