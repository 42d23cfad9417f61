"""The settings that a bundle is verified at: budgets, sets of layers or thresholds, as in a request."""

from __future__ import annotations

from collections.abc import Sequence

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.selection import check_budget
from gsx_exporter.rules.registry import rule_of
from gsx_exporter.rules.settings import Setting


def settings_of(manifest: Manifest, budgets: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """The settings to verify at, in descending order of the share kept. Adds a note on what cannot be verified.

    Args: budgets: the requested budgets; None for the usual ones.
    Raises:
        UsageError: no setting is left.
    """
    for budget in budgets or ():
        check_budget(budget)
    if manifest.policy is not None:
        return rule_of(manifest.policy).settings(manifest, budgets, notes)
    if budgets and set(budgets) != {1.0}:
        notes.append("The bundle has no gates: everything is kept, and the only budget is 1.")
    return [Setting(KeepSettings(), "1", 1.0)]


def exported_share(manifest: Manifest) -> float:
    """The share of skippable work that is kept by default."""
    return 1.0 if manifest.policy is None else rule_of(manifest.policy).exported_share(manifest)
