"""The section `selection` of `gsx.json`: how GateSkip chooses tokens, and its calibrated thresholds."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import model_validator

from gsx_engines.bundle.fields import Budget, Section, Sha256, Table, Threshold
from gsx_plugins.errors import UsageError


class CalibrationText(Section):
    """The text that thresholds were found on."""

    name: str
    sha256: Sha256
    tokens: int


class GridPoint(Section):
    """One budget of the calibrated grid: thresholds [L][attn, mlp] and the shares that they keep."""

    budget: Budget
    thresholds: tuple[tuple[Threshold, Threshold], ...]
    kept_share: float
    kept: tuple[tuple[float, float], ...]


class Selection(Section):
    """How kept tokens are chosen, and the exported default.

    Args:
        mode: `threshold` or `rank`.
        budget: the exported default.
        grid: with threshold selection, calibrated budgets in falling order; the first is 1.
        calibration: with threshold selection, the text.
    """

    mode: Literal["threshold", "rank"]
    budget: Budget
    grid: tuple[GridPoint, ...] = ()
    calibration: CalibrationText | None = None

    @model_validator(mode="after")
    def _grid_is_ordered(self) -> Selection:
        budgets = [point.budget for point in self.grid]
        if self.mode == "threshold" and (not budgets or budgets != sorted(set(budgets), reverse=True)):
            raise ValueError("threshold selection needs a grid of distinct budgets in falling order")
        return self

    def thresholds_for(self, budget: float) -> np.ndarray:
        """Thresholds [L, 2] float32 for a budget: calibrated ones, or between two calibrated neighbours.

        Between two budgets the thresholds are interpolated linearly, each branch for itself. Next to budget 1,
        whose thresholds are -inf, the neighbour's are taken (the share kept is then a little low).

        Raises:
            UsageError: a budget below the grid or not in (0, 1].
        """
        check_budget(budget)
        lowest = self.grid[-1]
        if budget < lowest.budget:
            raise UsageError(
                f"budget {budget:g} lies below the calibrated grid",
                expected=f"{lowest.budget:g} to 1",
                found=f"{budget:g}",
                todo=f"export again with --budget {budget:g}: the grid then reaches it",
            )
        for upper, lower in zip(self.grid, self.grid[1:], strict=False):
            if lower.budget < budget < upper.budget:
                high, low = _array(upper.thresholds), _array(lower.thresholds)
                share = (upper.budget - budget) / (upper.budget - lower.budget)
                with np.errstate(invalid="ignore"):
                    between = high + np.float32(share) * (low - high)
                return np.where(np.isneginf(high), low, between).astype(np.float32)
        point = next(p for p in self.grid if p.budget == budget)
        return _array(point.thresholds)


def check_budget(budget: float) -> None:
    """Refuse what is not a share above 0 and up to 1."""
    if not (isinstance(budget, int | float) and math.isfinite(budget) and 0 < budget <= 1):
        raise UsageError("budget is not a share", expected="a number above 0 and at most 1", found=repr(budget))


def _array(table: Table) -> np.ndarray:
    return np.asarray(table, dtype=np.float32)
