"""A budget that holds: the thresholds of a sequence's new tokens move along the calibrated grid.

Thresholds keep a budget's share on text like the calibration's. On other text they keep more or less. With `hold`, the
share that a sequence's own tokens kept so far decides the thresholds of its next ones (docs/design.md, section 3).
`engines/cpp/src/hold.cpp` computes the same; tests/vectors/hold.json compares the two. All of it is in whole numbers,
so that no rounding can differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.selection import Selection

# New tokens that share their thresholds. A verification never reads tokens of two blocks, so a draft is at most a token
# shorter than a block: as long as the longest draft of `AdaptiveLength`.
BLOCK = 16
# Tokens in which the branches that are owed, or were kept beyond the budget, are to be made up for.
WINDOW = 64
# Budgets are whole millionths here, and settings between two blocks whole thousandths.
MILLION, STEP = 10**6, 1000


@dataclass
class Hold:
    """The controller of one sequence.

    Args:
        selection: the calibrated grid.
        budget: the share to hold.
        branches: how many branches of the model may be skipped.
    """

    selection: Selection
    budget: float
    branches: int
    kept: int = 0
    tokens: int = 0
    _setting: int = field(init=False)
    _sum: int = field(init=False)

    def __post_init__(self) -> None:
        self._setting = self._sum = round(self.budget * MILLION)

    @property
    def gated(self) -> int:
        """Rows that the keep rule decided on."""
        return self.tokens * self.branches

    @property
    def left_in_block(self) -> int:
        """How many more tokens have the thresholds of now, 1 to `BLOCK`."""
        return BLOCK - self.tokens % BLOCK

    @property
    def setting(self) -> float:
        """The budget whose calibrated thresholds apply now."""
        return self.budget if not self.tokens // BLOCK else self._setting / MILLION

    @property
    def thresholds(self) -> np.ndarray:
        """The thresholds that apply now, [L, 2] float32."""
        return self.selection.thresholds_for(self.setting)

    def read(self, kept: int) -> bool:
        """Count a new token that the model has read and that stays.

        Args: kept: how many branches it ran.
        Returns: whether the thresholds of the next token may be others.
        """
        self.tokens += 1
        self.kept += kept
        if self.tokens % BLOCK:
            return False
        self._setting = self._next()
        self._sum += self._setting
        return True

    def _next(self) -> int:
        """The setting of the next block, in millionths.

        On average the settings so far kept the share so far; what lies between that and the budget is added to them,
        and so much more that what is owed is made up for in `WINDOW` tokens.
        """
        owed = round(self.budget * MILLION) * self.gated - self.kept * MILLION
        wanted = self._sum // (self.tokens // BLOCK) + owed // self.gated + owed // (WINDOW * self.branches)
        least = -(-round(self.selection.grid[-1].budget * MILLION) // STEP) * STEP
        return min(max(wanted // STEP * STEP, least), MILLION)


def with_thresholds(controls: RuntimeValues, holds: Sequence[Hold | None]) -> RuntimeValues:
    """Run-time values with the thresholds that apply now; holds: of each sequence, None where they stay."""
    thresholds = controls["thresholds"].copy()
    for row, hold in enumerate(holds):
        if hold is not None:
            thresholds[row] = hold.thresholds
    return {**controls, "thresholds": thresholds}


def hold_of(manifest: Manifest, keep: KeepSettings = AS_EXPORTED) -> Hold | None:
    """The controller for a request; None if it does not ask for one. Its settings were checked by `controls_for`."""
    if not keep.hold:
        return None
    assert manifest.selection is not None
    budget = manifest.selection.budget if keep.budget is None else keep.budget
    branches = len(manifest.skippable_in(range(manifest.decoder.num_layers)))
    return Hold(manifest.selection, budget, branches)
