"""The settings at which a rule's bundles are verified and compared, and the curves drawn of its calibration.

The settings of rules that have budgets are here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import Manifest
from gsx_plugins.errors import UsageError

DEFAULT_BUDGETS = (1.0, 0.85, 0.7, 0.5)

# Name of a setting -> what a request asks for, from the setting that keeps most to the one that keeps least.
Curve = Mapping[str, KeepSettings]


@dataclass(frozen=True)
class Setting:
    """One setting of a keep rule.

    Args:
        keep: what a request asks for.
        name: shown in tables.
        share: the share of skippable work that it keeps; for some rules only a rank to sort by.
    """

    keep: KeepSettings
    name: str
    share: float


@dataclass(frozen=True)
class LayerCurve:
    """A value measured in every layer, to be plotted.

    Args:
        title, caption: of the plot.
        label: of the value's axis.
        values: [L].
        shaded: ranges of layers (first, last) with a grey background.
        line: a value to mark with a line; None for no line.
    """

    title: str
    caption: str
    label: str
    values: tuple[float, ...]
    shaded: tuple[tuple[int, int], ...] = ()
    line: float | None = None


def budget_settings(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """Settings for the default budgets, or those asked for, as far as the calibrated grid covers them.

    Raises:
        UsageError: it covers none of them.
    """
    selection = manifest.selection
    assert selection is not None
    wanted = sorted({float(b) for b in (asked or (*DEFAULT_BUDGETS, selection.budget))}, reverse=True)
    if selection.mode == "rank":
        return [_at(budget) for budget in wanted]
    lowest = selection.grid[-1].budget
    for budget in wanted:
        if budget < lowest:
            notes.append(f"Budget {budget:g} is below the calibrated grid ({lowest:g} to 1), so it is left out.")
    reached = [_at(budget) for budget in wanted if budget >= lowest]
    if not reached:
        raise UsageError(
            "no budget to verify at",
            expected=f"one from {lowest:g} to 1",
            found=", ".join(f"{b:g}" for b in wanted),
        )
    return reached


def exported_budget(manifest: Manifest) -> float:
    """The share that a bundle with budgets keeps by default."""
    assert manifest.selection is not None
    return manifest.selection.budget


def calibrated_budgets(manifest: Manifest) -> Curve:
    """A curve of the grid's budgets."""
    assert manifest.selection is not None
    return {f"budget {point.budget:.3g}": KeepSettings(budget=point.budget) for point in manifest.selection.grid}


def note_unused_budgets(asked: Sequence[float] | None, notes: list[str]) -> None:
    """Add a note that a rule without budgets ignores those asked for."""
    if asked and set(asked) != {1.0}:
        notes.append("The bundle's policy has no budgets, so the default settings of the policy are verified.")


def _at(budget: float) -> Setting:
    return Setting(KeepSettings(budget=budget), f"{budget:g}", budget)
