"""What it costs to skip each branch, measured before training, and the weights that follow from it.

One branch at a time skips half of the tokens, those that its new gate gives the lowest scores, and the loss on some
rows is compared with that of the whole model. If a branch's cost grows with the share s that it skips as c s^p, the sum
of the costs is least where shares are proportional to c^(-1 / (p - 1)). On SmolLM2-135M skipping half costs two to
three times as much as a quarter, so p is 1 to 1.6; with 1.5 weights (`GateConfig.skip_weights`) go with 1 / c^2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gsx_engines.bundle.words import Branch
from gsx_exporter.training.gated import gate_name, is_constant
from gsx_exporter.training.learner import Learner
from gsx_plugins.progress import OnProgress, Progress

FILE = "gate-weights.json"  # in the working directory, so that a resumed run has the same
_SKIPPED = 0.5
_POWER = 2.0
# Nats: what is less is within the noise of some hundred tokens.
_LEAST = 0.01

SkipWeights = tuple[tuple[float, ...], ...]


def measured_weights(
    learner: Learner, ids: torch.Tensor, autocast: Callable[[], Any], report: OnProgress
) -> SkipWeights:
    """The weights of the gates of a model before its training.

    Args:
        learner: its gates and adapters as they begin.
        ids: [B, S] int64, rows of the text.
        autocast: the context that training passes run in.
        report: called after each branch.
    Returns: for each layer, the weights of its gates in the order of `GateConfig.branches`, at most 1; 0 for one that
        is held open.
    """
    gate = learner.gsx_config.gate
    assert gate is not None
    learner.eval()

    def nats(shares: dict[Any, float]) -> float:
        with autocast():
            found, _ = learner.figures(ids, ids, shares=shares)
        return float(found.nats.sum() / found.tokens.sum())

    def weight(layer: int, branch: Branch) -> float:
        if is_constant(getattr(learner.hf.model.layers[layer], gate_name(branch))):
            return 0.0
        cost = nats({(layer, branch): 1.0 - _SKIPPED}) - whole
        return round(float((_LEAST / max(cost, _LEAST)) ** _POWER), 6)

    layers = learner.gsx_config.num_layers
    whole = nats({})
    weights = []
    for layer in range(layers):
        weights.append(tuple(weight(layer, branch) for branch in gate.branches))
        report(Progress("measuring what branches cost", layer + 1, layers))
    return tuple(weights)


def kept_weights(work: Path) -> SkipWeights | None:
    """The weights that a run measured when it began; None if it has not."""
    path = work / FILE
    return tuple(tuple(row) for row in json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def keep_weights(work: Path, weights: SkipWeights) -> None:
    """Keep them for the run that goes on."""
    work.mkdir(parents=True, exist_ok=True)
    (work / FILE).write_text(json.dumps(weights) + "\n", encoding="utf-8")
