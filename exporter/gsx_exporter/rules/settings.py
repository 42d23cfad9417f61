"""At what a rule's bundles are verified and compared, and what is drawn of its calibration: the shapes, and the
settings of rules that have budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import Manifest
from gsx_plugins.errors import UsageError

DEFAULT_BUDGETS = (1.0, 0.85, 0.7, 0.5)

# Name of a setting -> what a request asks for, from careful to bold.
Curve = Mapping[str, KeepSettings]


@dataclass(frozen=True)
class Setting:
    """One setting of a keep rule.

    Args:
        keep: what a request asks for.
        name: in tables.
        share: of skippable work that it asks to keep.
    """

    keep: KeepSettings
    name: str
    share: float


@dataclass(frozen=True)
class LayerCurve:
    """Something measured in every layer, for a picture.

    Args:
        title, caption: of the picture; label: of its axis.
        values: [L].
        shaded: first and last layer of stretches that stand apart, on grey.
        line: a value to mark; None for nothing.
    """

    title: str
    caption: str
    label: str
    values: tuple[float, ...]
    shaded: tuple[tuple[int, int], ...] = ()
    line: float | None = None


def budget_settings(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """The usual budgets, or those asked for, that the calibrated grid reaches.

    Raises:
        UsageError: it reaches none of them.
    """
    selection = manifest.selection
    assert selection is not None
    wanted = sorted({float(b) for b in (asked or (*DEFAULT_BUDGETS, selection.budget))}, reverse=True)
    if selection.mode == "rank":
        return [_at(budget) for budget in wanted]
    lowest = selection.grid[-1].budget
    for budget in wanted:
        if budget < lowest:
            notes.append(f"Budget {budget:g} lies below the calibrated grid ({lowest:g} to 1): left out.")
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
    """The budgets of the grid."""
    assert manifest.selection is not None
    return {f"budget {point.budget:.3g}": KeepSettings(budget=point.budget) for point in manifest.selection.grid}


def note_unused_budgets(asked: Sequence[float] | None, notes: list[str]) -> None:
    """Note that a rule without budgets does not use those that are asked for."""
    if asked and set(asked) != {1.0}:
        notes.append("The bundle has no budgets but sets of layers: the usual ones are verified.")


def _at(budget: float) -> Setting:
    return Setting(KeepSettings(budget=budget), f"{budget:g}", budget)
