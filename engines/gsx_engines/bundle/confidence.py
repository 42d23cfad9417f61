"""Measures of confidence at an exit (policy `calm`), and the range of each."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from gsx_plugins.errors import UsageError

Measure = Literal["softmax", "state", "classifier"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Range(NamedTuple):
    """Least and largest value of a measure."""

    least: float
    most: float


RANGES: dict[Measure, Range] = {
    "softmax": Range(0.0, 1.0),
    "state": Range(-1.0, 1.0),
    "classifier": Range(0.0, 1.0),
}


def check_threshold(threshold: float, least: float, most: float) -> None:
    """Refuse a threshold outside a measure's range; plus infinity, at which nothing leaves, is allowed.

    Raises:
        UsageError: it is.
    """
    if threshold != math.inf and not least <= threshold <= most:
        raise UsageError(
            "the exit threshold lies outside the measure's range",
            expected=f"{least:g} to {most:g}, or inf to leave nothing out",
            found=f"{threshold:g}",
        )
