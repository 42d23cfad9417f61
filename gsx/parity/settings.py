"""What a bundle is verified at: budgets, or sets of layers, as a request would ask for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsx_engines.bundle.confidence import RANGES
from gsx_engines.bundle.controls import Keep, layer_mask
from gsx_engines.bundle.drafts import places_text
from gsx_engines.bundle.fields import BRANCHES
from gsx_engines.bundle.layer_sets import Places
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import Confidence
from gsx_engines.bundle.selection import check_budget
from gsx_plugins.errors import UsageError

DEFAULT_BUDGETS = (1.0, 0.85, 0.7, 0.5)
DEFAULT_SPEEDUP = 4 / 3


@dataclass(frozen=True)
class Setting:
    """One setting of the keep rule.

    Args:
        keep: what a request asks for.
        name: in tables.
        share: of skippable work that it asks to keep.
    """

    keep: Keep
    name: str
    share: float


def settings_of(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """The settings to verify at, in falling order of what they keep; what cannot be is noted.

    Args: asked: budgets; None for the usual ones.
    Raises:
        UsageError: none is left.
    """
    for budget in asked or ():
        check_budget(budget)
    policy = manifest.policy
    if manifest.selection is not None:
        return [Setting(Keep(budget=b), f"{b:g}", b) for b in _budgets(manifest, asked, notes)]
    if asked and set(asked) != {1.0}:
        notes.append(
            "The bundle has no gates: everything is kept, and there is one budget, 1."
            if policy is None
            else "The bundle has no budgets but sets of layers: the usual ones are verified."
        )
    if policy is None:
        return [Setting(Keep(), "1", 1.0)]
    if policy.confidence is not None:
        return _thresholds(policy.confidence)
    return _sets(manifest)


def _budgets(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[float]:
    selection = manifest.selection
    assert selection is not None
    wanted = sorted({float(b) for b in (asked or (*DEFAULT_BUDGETS, selection.budget))}, reverse=True)
    if selection.mode == "rank":
        return wanted
    lowest = selection.grid[-1].budget
    chosen = [budget for budget in wanted if budget >= lowest]
    for budget in wanted:
        if budget < lowest:
            notes.append(f"Budget {budget:g} lies below the calibrated grid ({lowest:g} to 1): left out.")
    if not chosen:
        raise UsageError(
            "no budget to verify at",
            expected=f"one from {lowest:g} to 1",
            found=", ".join(f"{b:g}" for b in wanted),
        )
    return chosen


def _sets(manifest: Manifest) -> list[Setting]:
    """The exported set, all layers, an exit, a speed-up, and a set that tells branches apart; each mask once."""
    layers = manifest.decoder.num_layers
    policy = manifest.policy
    assert policy is not None
    trained = [depth for depth in policy.exits if depth < layers]
    depths = trained or [layers // 2]
    wanted = [
        (Keep(), "as exported"),
        (Keep(layers=f"0-{layers - 1}"), "all layers"),
        *((Keep(exit=depth), f"exit {depth}") for depth in depths if depth > 0),
        (Keep(layers=places_text(_uneven(layers))), "every second branch"),
    ]
    if layers >= 2 * DEFAULT_SPEEDUP:
        wanted.append((Keep(speedup=DEFAULT_SPEEDUP), f"speed-up {DEFAULT_SPEEDUP:.2f}"))
    found: dict[bytes, Setting] = {}
    for keep, name in wanted:
        mask = layer_mask(manifest, keep)
        found.setdefault(mask.tobytes(), Setting(keep, name, float(mask.mean())))
    return sorted(found.values(), key=lambda one: -one.share)


def _thresholds(confidence: Confidence) -> list[Setting]:
    """Nothing leaves, the exported threshold, and the lowest, where all that may leave does so at the first exit."""
    wanted = {math.inf: "no exits", confidence.threshold: "as exported"}
    for threshold in (0.5, RANGES[confidence.measure].least):
        wanted.setdefault(threshold, f"threshold {threshold:g}")
    # What is kept is not known beforehand: a lower threshold keeps less.
    return [
        Setting(Keep(exit_threshold=threshold), name, share)
        for (threshold, name), share in zip(
            sorted(wanted.items(), reverse=True), np.linspace(1, 0, len(wanted)), strict=True
        )
    ]


def _uneven(layers: int) -> Places:
    """Attention in even layers, the MLP in odd ones, both in the first."""
    return tuple(
        (layer, branch)
        for layer in range(layers)
        for number, branch in enumerate(BRANCHES)
        if layer == 0 or layer % 2 == number
    )
