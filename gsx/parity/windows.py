"""Whole windows of text in one call each: accumulates what both sides computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gsx.parity.closeness import Accumulator, Comparer, Observation
from gsx.parity.quality import QualityCounter
from gsx_exporter.evaluation import losses


@dataclass
class WindowSums:
    """Sums over the windows at one setting.

    Args:
        against_reference: the engine against the reference.
        rounding: the reference in float32 against itself in float64; None if it is in float32.
        quality: the quality that the engine's arithmetic costs.
        fast: logits of the runner that generates; wrong_counts: how often it kept a wrong number of rows.
        first: the reference's observation of the first window; None before it.
    """

    against_reference: Comparer
    rounding: Comparer | None
    quality: QualityCounter
    fast: Accumulator = field(default_factory=Accumulator)
    wrong_counts: int = 0
    first: Observation | None = None
    _kept: list[np.ndarray] = field(default_factory=list)
    _reference_losses: list[np.ndarray] = field(default_factory=list)
    _engine_losses: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        window: np.ndarray,
        reference: Observation,
        engine: Observation,
        fast: np.ndarray,
        single: Sequence[Observation] | None,
    ) -> None:
        """Compare a window [S] of token ids.

        Args:
            fast: logits [S, V] of the runner that generates.
            single: the reference in float32, if it is also in float64.
        """
        self.first = self.first or reference
        self.against_reference.add([reference], [engine])
        if self.rounding is not None and single is not None:
            self.rounding.add([reference], single)
        self.quality.add(window, reference, engine, fast)
        self._kept.append(reference.keep)
        self._reference_losses.append(losses(reference.logits, window))
        self._engine_losses.append(losses(engine.logits, window))

    @property
    def kept(self) -> np.ndarray:
        """Shares [L, 2] of tokens that the reference keeps; 1 where there is no gate."""
        return np.concatenate(self._kept, axis=-1).mean(axis=-1)

    @property
    def nats(self) -> tuple[float, float]:
        """Mean loss per token, of the reference and of the engine."""
        reference, engine = self._reference_losses, self._engine_losses
        return float(np.concatenate(reference).mean()), float(np.concatenate(engine).mean())

    @property
    def scored_tokens(self) -> int:
        """Tokens that have a loss."""
        return sum(loss.size for loss in self._reference_losses)
