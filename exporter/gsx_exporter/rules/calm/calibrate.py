"""Calibrating the exit threshold of policy `calm` under a guarantee.

The traced decoder runs the calibration text in full, and then at each threshold of a fixed grid, starting with the
highest, until the guarantee fails (`risk_control.py`). What is below the first exit is run once. A prompt's risk is
measured on the text itself: the input tokens are always those of the text, and what is compared is the model's next
token, or its loss, at each position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gsx_engines.bundle.confidence import Measure
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.rule import exit_watcher
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.evaluation import losses
from gsx_exporter.rules.calm.risk_control import (
    Outcome,
    Risk,
    RiskTarget,
    agreement_risk,
    fixed_sequence_test,
    loss_risk,
)
from gsx_plugins.progress import OnProgress, Progress, silent

STAGE = "calibrating exits"
# Tokens in a prompt. Short prompts, because the guarantee depends on the number of prompts.
PROMPT_TOKENS = 64
# Thresholds to try, from the most careful (highest) to the boldest. States that no longer change have cosines near 1.
GRIDS: dict[Measure, tuple[float, ...]] = {
    "softmax": (0.99, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
    # Tokens that may exit and tokens that may not had equal weight in training, however rare the latter are, so most
    # probabilities are high.
    "classifier": (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.0),
    "gate": (0.99, 0.975, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
    "state": (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9, 0.8, 0.7, 0.5, 0.0, -1.0),
}


@dataclass(frozen=True)
class CalibratedExits:
    """The outcome of the test, and the share of (token, branch) pairs that ran at each threshold tested."""

    outcome: Outcome
    kept: tuple[float, ...]


@dataclass(frozen=True)
class _Pass:
    """Results of one pass: most likely next tokens [n, S] int64, losses [n, S - 1] if wanted, and the share run."""

    tokens: np.ndarray
    nats: np.ndarray
    kept: float


def calibrate_exits(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    options: DecoderOptions,
    guarantee: RiskTarget,
    risk: Risk,
    grid: tuple[float, ...],
    on_progress: OnProgress = silent,
) -> CalibratedExits:
    """Find the boldest exit threshold of a grid that meets a guarantee.

    Args:
        checkpoint: the model.
        ids: [n, S] int64, prompts.
        options: with a rule that reads `exit_threshold`.
        guarantee: tolerance and confidence.
        risk: what the guarantee is about.
        grid: from the most careful threshold to the boldest.
        on_progress: called before each pass over the text.
    Raises:
        UsageError: too few prompts.
    """
    watcher = exit_watcher(options.rule)
    first = min(watcher.exit_depths()) if watcher else 0
    with torch.inference_mode():
        walk = Walk(checkpoint, ids, options)
        layers = [walk.layer(number) for number in range(checkpoint.config.num_layers)]
        below = walk.stream(_controls(float("inf")))
        for number in range(first):
            walk.through(number, layers[number], below)

    def run(threshold: float) -> _Pass:
        with torch.inference_mode():
            # All run below the first exit, and the confidence there is the same at any threshold.
            stream, kept = walk.resumed(below, _controls(threshold)), [1.0] * (len(BRANCHES) * first)
            for number in range(first, len(layers)):
                kept += [float(ran.float().mean()) for ran in walk.through(number, layers[number], stream).values()]
            tokens, nats = [], []
            for some, logits in walk.logits(stream):
                tokens.append(logits.argmax(dim=-1).numpy())
                if risk == "loss":
                    nats.append(losses(logits.numpy(), some.numpy()))
        return _Pass(np.concatenate(tokens), np.concatenate(nats) if nats else np.zeros(0), float(np.mean(kept)))

    on_progress(Progress(STAGE, 0, len(grid) + 1))
    full = run(float("inf"))
    shares: list[float] = []

    def risks_at(threshold: float) -> np.ndarray:
        on_progress(Progress(STAGE, 1 + len(shares), len(grid) + 1))
        found = run(threshold)
        shares.append(found.kept)
        if risk == "agreement":
            return agreement_risk(found.tokens, full.tokens)
        return loss_risk(found.nats, full.nats)

    outcome = fixed_sequence_test(grid, risks_at, len(ids), guarantee)
    return CalibratedExits(outcome, tuple(shares))


def _controls(threshold: float) -> RuntimeValues:
    return {"exit_threshold": np.array([threshold], np.float32), "full_until": np.zeros(1, np.int64)}
