"""What a bundle is verified at: budgets, sets of layers or thresholds, as a request would ask for them."""

from __future__ import annotations

from collections.abc import Sequence

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.selection import check_budget
from gsx_exporter.rules.registry import rule_of
from gsx_exporter.rules.settings import Setting


def settings_of(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """The settings to verify at, in falling order of what they keep; what cannot be verified is noted.

    Args: asked: budgets; None for the usual ones.
    Raises:
        UsageError: none is left.
    """
    for budget in asked or ():
        check_budget(budget)
    if manifest.policy is not None:
        return rule_of(manifest.policy).settings(manifest, asked, notes)
    if asked and set(asked) != {1.0}:
        notes.append("The bundle has no gates: everything is kept, and there is one budget, 1.")
    return [Setting(KeepSettings(), "1", 1.0)]


def exported_share(manifest: Manifest) -> float:
    """The share of skippable work that is kept by default."""
    return 1.0 if manifest.policy is None else rule_of(manifest.policy).exported_share(manifest)
