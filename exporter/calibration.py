"""Thresholds for a grid of budgets, in one walk through the model.

Skipping changes what later layers see, and so their scores. The calibration therefore goes layer by layer: a
branch's threshold is the (1 - budget) quantile of the scores of the states that the branches before it,
already skipping, have produced. Equal scores (the first branch knows a token by its id alone, and texts
repeat tokens) can make a share impossible to meet at one branch; what it misses is made up for by the branches after
it, so that the share kept over all branches meets the budget. It is counted, not assumed. Rule: docs/design.md,
section 3, GateSkip `threshold`.

One layer's weights are in memory at a time; every budget has its own states, and all go through a layer
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint import Checkpoint
from exporter.config import BRANCHES, Branch
from exporter.decoder.ends import distinct_windows
from exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, Kept, KeyValue
from exporter.decoder.loading import load_entry, load_layer
from exporter.rules.base import apply_forced
from exporter.rules.gateskip import GateSkip

# Close where quality is: budgets between two points are interpolated (engines/bundle/manifest.py).
DEFAULT_GRID = (1.0, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
DEFAULT_TOKENS = 4096
# Scores nearer than this may be one score, rounded differently: they are kept or skipped together.
TIE = 4e-6
# How far from the share a threshold may move for the sake of a wider gap (the budget allows 0.01).
NEAR_SHARE = 0.002


@dataclass(frozen=True)
class GridPoint:
    """One budget's thresholds and what they keep.

    Args:
        budget: the share asked for.
        thresholds: [L, 2] float32 (attn, mlp); -inf where everything is kept, also at a branch without gate.
        kept: [L, 2] float64, the share of valid tokens kept on the calibration text; 1 without gate.
        kept_share: mean of `kept` over the gated branches.
    """

    budget: float
    thresholds: np.ndarray
    kept: np.ndarray
    kept_share: float


@dataclass
class _Run:
    """The states of one budget on their way through the layers."""

    budget: float
    hidden: Tensor
    below: KeyValue | None
    thresholds: np.ndarray
    kept: np.ndarray
    owed: float = 0.0
    """Share that the branches so far have kept too little, summed over them."""


def calibrate(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    budgets: Sequence[float],
    options: DecoderOptions,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[GridPoint]:
    """Thresholds for each budget.

    Args:
        checkpoint: a gated checkpoint.
        ids: [M, S] int64, calibration text.
        budgets: shares in (0, 1].
        options: the K/V policy matters; the type of the computation is float32.
        on_layer: called with (layers done, layers) as it goes.
    Returns: one point a budget, in their order.
    """
    config = checkpoint.config
    assert config.gate is not None, "calibration is for gated models"
    options = DecoderOptions(GateSkip(config.gate, config.eos_ids), options.kv_policy, torch.float32)
    tokens = torch.from_numpy(ids)
    with torch.inference_mode():
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        hidden, cos, sin, *rest = load_entry(checkpoint, options)(tokens, torch.ones_like(tokens), positions)
        *masks, forced, forced_score = rest
        shape = (config.num_layers, 2)
        runs = [_Run(b, hidden, None, np.full(shape, -np.inf, np.float32), np.ones(shape)) for b in budgets]
        windows = distinct_windows(config)
        for i in range(config.num_layers):
            layer = load_layer(checkpoint, i, options)
            mask = masks[windows.index(config.windows[i])]
            call = CallState(cos, sin, mask, {"forced": forced, "forced_score": forced_score})
            for run in runs:
                _through(layer, i, run, call)
            on_layer(i + 1, config.num_layers)
    columns = [BRANCHES.index(branch) for branch in config.gated_branches]
    return [GridPoint(r.budget, r.thresholds, r.kept, float(r.kept[:, columns].mean())) for r in runs]


def threshold_for(scores: np.ndarray, share: float) -> np.float32:
    """The threshold that keeps a share of the scores: their (1 - share) quantile, away from any score.

    A threshold on a score would leave that token's choice to rounding, and with it the choice of every token
    with the same id at the first branch. So the threshold stands in the middle of the widest gap near the
    quantile; where that falls among equal scores, all of them are kept or none, whichever is closer to the
    share.

    Args: scores [n] float32; share: wanted share of scores above the threshold.
    """
    ordered = np.sort(scores.astype(np.float64))
    n = len(ordered)
    # gaps[k] is the room for a threshold that skips k scores.
    gaps = np.diff(ordered, prepend=-np.inf, append=np.inf)
    wanted = (1.0 - min(max(share, 0.0), 1.0)) * n
    distance = np.abs(np.arange(n + 1) - wanted)
    near = np.flatnonzero(distance <= max(NEAR_SHARE * n, distance.min()))
    cut = near[gaps[near].argmax()]
    if gaps[cut] < TIE:
        clear = np.flatnonzero(gaps >= TIE)
        cut = clear[distance[clear].argmin()]
    if cut == 0:
        return np.float32(ordered[0] - TIE)
    if cut == n:
        return np.float32(ordered[-1] + TIE)
    return np.float32((ordered[cut - 1] + ordered[cut]) / 2)


def _through(layer: DecoderLayer, number: int, run: _Run, call: CallState) -> None:
    """Take one budget's states through one layer, choosing its thresholds on the way."""
    gated = layer.config.gated_branches
    empty = run.hidden.new_zeros((call.mask.shape[0], layer.config.num_kv_heads, 0, layer.config.head_dim))
    kept = _choose(layer, "attn", number, run, call) if "attn" in gated else None
    past = KeyValue(empty, empty)
    run.hidden, _, run.below, _ = layer.attention_branch(run.hidden, call, past, run.below, kept)
    kept = _choose(layer, "mlp", number, run, call) if "mlp" in gated else None
    run.hidden, _ = layer.mlp_branch(run.hidden, call, kept)


def _choose(layer: DecoderLayer, branch: Branch, number: int, run: _Run, call: CallState) -> Kept:
    normed = layer.normed(branch, run.hidden)
    gate, score = layer.gate(branch, run.hidden, normed)
    valid = score[~call.values["forced"]].numpy()
    place = (number, BRANCHES.index(branch))
    gated = len(layer.config.gated_branches)
    left = layer.config.num_layers * gated - (number * gated + layer.config.gated_branches.index(branch))
    tau = float(threshold_for(valid, run.budget + run.owed / left)) if run.budget < 1.0 else -math.inf
    run.thresholds[place] = tau
    run.kept[place] = float((valid > tau).mean())
    run.owed += run.budget - run.kept[place]
    index = torch.nonzero(apply_forced(score, call.values) > tau).reshape(-1)
    return Kept(normed.index_select(0, index), index, gate.index_select(0, index), run.hidden)
