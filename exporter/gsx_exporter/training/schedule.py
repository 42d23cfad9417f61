"""Learning rate, budget, exit, dropped layers and text of a step, as plain functions of the step's number.

Nothing here has state: random values come from a generator seeded with the run's seed and the step. So a run that was
stopped continues exactly as if it had not been. Steps count from 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gsx_exporter.training.config import TrainConfig

# One stream of random numbers for each use, so that they do not depend on each other.
_BUDGET_STREAM, _DROPOUT_STREAM, _ORDER_STREAM = 1, 2, 3


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = config.steps - step
    return min(1.0, left / (config.decay_steps + 1))


def budget_floor(config: TrainConfig, step: int) -> float:
    """The lowest budget of a step: falls linearly from 1.0 to budget_end (methods.md 3.2)."""
    if step >= config.budget_steps:
        return config.budget_end
    return 1.0 - (1.0 - config.budget_end) * step / config.budget_steps


def budget(config: TrainConfig, step: int) -> float:
    """The budget that a step trains at."""
    floor = budget_floor(config, step)
    if config.budget_rule == "falling":
        return floor
    return floor + (1.0 - floor) * float(_rng(config, _BUDGET_STREAM, step).random())


def exit_of_step(config: TrainConfig, step: int) -> int | None:
    """The depth of this step's early-exit loss, in rotation (LayerSkip's rotational curriculum); None without exits."""
    return config.exits[step % len(config.exits)] if config.exits else None


def exit_weight(depth: int) -> float:
    """Weight of the loss at a depth, before the weights are scaled to a sum of 1; grows about quadratically."""
    return depth * (depth + 1) / 2


def dropout_chances(layers: int, p_max: float) -> list[float]:
    """Probability that each layer is dropped: D(l) * p_max, D(l) = exp(l ln2 / (L - 1)) - 1 (methods.md 4.1)."""
    if layers == 1:
        return [0.0]
    return [p_max * (math.exp(layer * math.log(2) / (layers - 1)) - 1) for layer in range(layers)]


def live_sequences(config: TrainConfig, layers: int, step: int) -> torch.Tensor:
    """Which sequences run which layer at a step: bool [L, batch]. A dropped layer adds nothing."""
    chances = np.array(dropout_chances(layers, config.layer_dropout))[:, None]
    drawn = _rng(config, _DROPOUT_STREAM, step).random((layers, config.batch_size))
    return torch.from_numpy(drawn >= chances)


def batch(config: TrainConfig, tokens: np.ndarray, step: int) -> torch.Tensor:
    """The token blocks of a step; each pass over the text has a new random order.

    Args: tokens [N], N > 2 * sequence_length.
    Returns: ids [batch, sequence_length + 1] int64: inputs and, one position later, targets.
    """
    length = config.sequence_length
    blocks = blocks_per_pass(config, len(tokens))
    rows = []
    for number in range(step * config.batch_size, (step + 1) * config.batch_size):
        turn, place = divmod(number, blocks)
        rng = _rng(config, _ORDER_STREAM, turn)
        start = int(rng.integers(length)) + int(rng.permutation(blocks)[place]) * length
        rows.append(tokens[start : start + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def blocks_per_pass(config: TrainConfig, tokens: int) -> int:
    """Number of blocks in one pass over the text; each pass begins at another offset."""
    return (tokens - config.sequence_length) // config.sequence_length


def _rng(config: TrainConfig, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng((config.seed, stream, number))
