"""Thresholds for a grid of budgets, as the manifest stores them: what every rule with thresholds calibrates."""

from __future__ import annotations

from collections.abc import Sequence

from gsx_engines.bundle.selection import GridPoint, Selection
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.defaults import BUDGET_GRID
from gsx_exporter.rules.calibration import CalibratedPoint, calibrate
from gsx_exporter.rules.plan import RulePlan, text_entry
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress


def grid_with(budget: float) -> Sequence[float]:
    """The calibrated budgets: the default grid and the budget asked for, in falling order."""
    return sorted({*BUDGET_GRID, budget}, reverse=True)


def at_budget(
    plan: RulePlan, rule: TracedRule, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress
) -> Selection:
    """A plan's budget: by rank, or by thresholds on a text, where each layer sees what those below it skipped."""
    assert plan.budget is not None
    if plan.by_rank:
        return Selection(mode="rank", budget=plan.budget)
    assert text is not None
    options = DecoderOptions(rule, plan.kv_policy)
    points = calibrate(checkpoint, text.ids, grid_with(plan.budget), options, on_progress)
    return by_thresholds(plan.budget, points, text)


def by_thresholds(budget: float, points: Sequence[CalibratedPoint], text: TokenText) -> Selection:
    """A calibrated grid in the manifest."""
    return Selection(
        mode="threshold",
        budget=budget,
        grid=tuple(
            GridPoint(
                budget=point.budget,
                thresholds=tuple((float(a), float(b)) for a, b in point.thresholds),
                kept_share=point.kept_share,
                kept=tuple((float(a), float(b)) for a, b in point.kept),
            )
            for point in points
        ),
        calibration=text_entry(text),
    )
