"""How tokens are chosen: the selections of docs/design.md section 3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.bundle.counting import kept_count as kept_count
from engines.bundle.manifest import check_budget
from engines.errors import UsageError


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
