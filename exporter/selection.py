"""How tokens are chosen: the selections of docs/design.md section 3, and the one function that counts them.

`kept_count` is the count that every part of gsx shares: the reference, the graphs and the reports.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.bundle.manifest import check_budget
from engines.errors import UsageError

# A budget is a decimal of at most six places, so that counting is a matter of whole numbers.
BUDGET_PLACES = 6
_MILLION = 10**BUDGET_PLACES


@dataclass(frozen=True)
class KeepAll:
    """Every token runs every branch; gates still multiply what the branches give."""


@dataclass(frozen=True)
class Threshold:
    """Keep a token at a branch when its score exceeds the branch's threshold.

    Args:
        thresholds: [L, 2] float32, columns in the order of `BRANCHES`; -inf keeps all.
    """

    thresholds: np.ndarray

    def __post_init__(self) -> None:
        found = self.thresholds
        if found.ndim != 2 or found.shape[1] != 2 or found.dtype != np.float32:
            raise UsageError(
                "thresholds: wrong shape or type",
                expected="[L, 2] float32",
                found=f"{found.shape} {found.dtype}",
            )
        if np.isnan(found).any():
            raise UsageError("thresholds: hold NaN", expected="numbers, or -inf to keep every token")


@dataclass(frozen=True)
class Rank:
    """Keep the best K scores of the call at every branch.

    Args:
        budget: the share to keep, in (0, 1].
    """

    budget: float

    def __post_init__(self) -> None:
        check_budget(self.budget)


Selection = KeepAll | Threshold | Rank


def kept_count(n: int, budget: float) -> int:
    """K, how many of n tokens `rank` selection keeps.

    Args:
        n: valid tokens of the call: neither padding nor end-of-text.
        budget: read as a decimal of six places, since at run time it arrives as a float32.
    Rule: docs/design.md section 3: K = n when budget >= 1 or n <= 1, else n - 1 - floor((1 - budget) * (n - 1)),
        where floor must not fall for a product that floating point made a little too small.
    """
    millionths = round(budget * _MILLION)
    if millionths >= _MILLION or n <= 1:
        return n
    return n - 1 - (_MILLION - millionths) * (n - 1) // _MILLION
