"""Budget, exits and dropped layers of a step, as plain functions of the step's number.

Nothing here has state: random values come from a generator seeded with the run's seed, the step and, for dropped
layers, the row of the text. So a run that was stopped continues as if it had not been, and several processes draw what
one would. Steps count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gsx_exporter.training.settings import ExitSettings, GateSettings

# One stream of random numbers for each use, so that they do not depend on each other.
_BUDGET_STREAM, _DROPOUT_STREAM = 1, 2


@dataclass(frozen=True)
class Plan:
    """What a step trains.

    Args:
        step: its number.
        budget: share of tokens that each gated branch keeps; 1.0 without gates.
        exits: depth -> weight of its loss; the whole model's weight is `whole`. Weights sum to 1.
        whole: weight of the loss of the last layer.
        dropout: p_max; 0 for none.
        straight_through: see `GateSettings.estimator`.
    """

    step: int
    budget: float
    exits: dict[int, float]
    whole: float
    dropout: float
    straight_through: bool


class Schedule:
    """The plans of a run.

    Args:
        layers: of the model.
        gate, exits: the method.
        steps: of the whole run.
        seed: of the run.
    """

    def __init__(
        self, layers: int, gate: GateSettings | None, exits: ExitSettings | None, *, steps: int, seed: int
    ) -> None:
        self._layers, self._gate, self._exits = layers, gate, exits
        self._steps, self._seed = steps, seed
        self.depths = exits.of(layers) if exits is not None else ()

    def plan(self, step: int) -> Plan:
        """The plan of a step."""
        exits, whole = self._weights(self.exits_of(step))
        through = self._gate is not None and self._gate.estimator == "straight-through"
        return Plan(step, self.budget(step), exits, whole, self._exits.dropout if self._exits else 0.0, through)

    def lowest_budget(self, step: int) -> float:
        """It falls linearly from its start to its end, and stays there (methods.md 3.2)."""
        if self._gate is None:
            return 1.0
        ramp = self._gate.budget_ramp * self._steps
        share = min(1.0, step / ramp) if ramp else 1.0
        return self._gate.budget_start + (self._gate.budget_end - self._gate.budget_start) * share

    def budget(self, step: int) -> float:
        """The budget that a step trains at."""
        lowest = self.lowest_budget(step)
        if self._gate is None or self._gate.budget_rule == "falling":
            return lowest
        return lowest + (1.0 - lowest) * float(self._rng(_BUDGET_STREAM, step).random())

    def exits_of(self, step: int) -> tuple[int, ...]:
        """The exits that a step trains, by the curriculum."""
        if self._exits is None or not self.depths:
            return ()
        if self._exits.turns == "all":
            return self.depths
        if self._exits.turns == "rotate":
            return (self.depths[step % len(self.depths)],)
        # From the last layer down, all of them by the middle of the run (methods.md 4.1).
        reached = math.ceil(len(self.depths) * min(1.0, 2 * (step + 1) / self._steps))
        return self.depths[len(self.depths) - reached :]

    def _weights(self, depths: Sequence[int]) -> tuple[dict[int, float], float]:
        if self._exits is None or not depths:
            return {}, 1.0
        if self._exits.weights == "equal" or self._exits.target == "model":
            whole, found = 1.0, dict.fromkeys(depths, self._exits.scale)
        else:
            whole = exit_weight(self._layers)
            found = {depth: self._exits.scale * exit_weight(depth) for depth in depths}
        total = whole + sum(found.values())
        return {depth: weight / total for depth, weight in found.items()}, whole / total

    def live(self, plan: Plan, rows: torch.Tensor) -> torch.Tensor | None:
        """Which rows run which layer in a step; a dropped layer adds nothing.

        Args: rows: [B] int64, the numbers of the rows in the text.
        Returns: bool [L, B]; None if all run.
        """
        if not plan.dropout:
            return None
        chances = np.array(dropout_chances(self._layers, plan.dropout))
        drawn = [self._rng(_DROPOUT_STREAM, plan.step, row).random(self._layers) for row in rows.tolist()]
        return torch.from_numpy(np.stack([row >= chances for row in drawn], axis=1)).to(rows.device)

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, *numbers))


def exit_weight(depth: int) -> float:
    """Weight of the loss at a depth, before the weights are scaled to a sum of 1; grows about quadratically."""
    return depth * (depth + 1) / 2


def dropout_chances(layers: int, p_max: float) -> list[float]:
    """Probability that each layer is dropped: D(l) * p_max, D(l) = exp(l ln2 / (L - 1)) - 1 (methods.md 4.1)."""
    if layers == 1:
        return [0.0]
    return [p_max * (math.exp(layer * math.log(2) / (layers - 1)) - 1) for layer in range(layers)]
