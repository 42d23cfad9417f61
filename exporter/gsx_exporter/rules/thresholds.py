"""Thresholds for a grid of budgets, as the manifest stores them: the calibration of every rule with thresholds."""

from __future__ import annotations

from collections.abc import Sequence

from gsx_engines.bundle.selection import GridPoint, Selection
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.defaults import BUDGET_GRID
from gsx_exporter.rules.calibration import CalibratedPoint, calibrate
from gsx_exporter.rules.plan import RulePlan, text_entry
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress


def grid_with(budget: float) -> Sequence[float]:
    """The budgets to calibrate: the default grid and the given budget, in descending order."""
    return sorted({*BUDGET_GRID, budget}, reverse=True)


def at_budget(
    plan: RulePlan, rule: TracedRule, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress
) -> Selection:
    """The selection for a plan's budget: by rank, or by thresholds that are calibrated on a text."""
    assert plan.budget is not None
    if plan.by_rank:
        return Selection(mode="rank", budget=plan.budget)
    assert text is not None
    options = DecoderOptions(rule, plan.kv_policy)
    points = calibrate(checkpoint, text.ids, grid_with(plan.budget), options, on_progress)
    return by_thresholds(plan.budget, points, text)


def by_thresholds(budget: float, points: Sequence[CalibratedPoint], text: TokenText) -> Selection:
    """The manifest's section for a calibrated grid."""
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
