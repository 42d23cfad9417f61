"""The section `selection` of `gsx.json`: how tokens are selected, and the calibrated thresholds."""

from __future__ import annotations

import math

import numpy as np
from pydantic import model_validator

from gsx_engines.bundle.fields import Budget, Section, Sha256, Table, Threshold
from gsx_engines.bundle.words import SelectionMode
from gsx_plugins.errors import UsageError


class CalibrationText(Section):
    """The text that something was calibrated on."""

    name: str
    sha256: Sha256
    tokens: int


class GridPoint(Section):
    """One budget of the calibrated grid: its thresholds [L][attn, mlp], and the share that they keep in all and by
    branch."""

    budget: Budget
    thresholds: tuple[tuple[Threshold, Threshold], ...]
    kept_share: float
    kept: tuple[tuple[float, float], ...]


class Selection(Section):
    """How kept tokens are selected, and the exported budget.

    Args:
        mode: `threshold` or `rank`.
        budget: the exported default.
        grid: for threshold selection, the calibrated budgets in descending order; the first is 1.
        calibration: for threshold selection, the text.
    """

    mode: SelectionMode
    budget: Budget
    grid: tuple[GridPoint, ...] = ()
    calibration: CalibrationText | None = None

    @model_validator(mode="after")
    def _grid_is_ordered(self) -> Selection:
        budgets = [point.budget for point in self.grid]
        if self.mode == "threshold" and (not budgets or budgets != sorted(set(budgets), reverse=True)):
            raise ValueError("threshold selection needs a grid of distinct budgets in descending order")
        return self

    def thresholds_for(self, budget: float) -> np.ndarray:
        """Thresholds [L, 2] float32 for a budget: the calibrated ones, or interpolated between two calibrated budgets.

        The interpolation is linear, for each branch separately. Next to budget 1, whose thresholds are -inf, those of
        the neighbour are used (the share kept is then a little too low).

        Raises:
            UsageError: a budget below the grid or not in (0, 1].
        """
        check_budget(budget)
        lowest = self.grid[-1]
        if budget < lowest.budget:
            raise UsageError(
                f"budget {budget:g} is below the calibrated grid",
                expected=f"{lowest.budget:g} to 1",
                found=f"{budget:g}",
                todo=f"export again with budget {budget:g}, so that the grid includes it",
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
    """Refuse a budget that is not in (0, 1]."""
    if not (isinstance(budget, int | float) and math.isfinite(budget) and 0 < budget <= 1):
        raise UsageError("the budget is out of range", expected="a number above 0 and at most 1", found=repr(budget))


def _array(table: Table) -> np.ndarray:
    return np.asarray(table, dtype=np.float32)
