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
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import BRANCHES, Branch
from gsx_exporter.decoder.ends import distinct_windows
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, Kept, KeyValue
from gsx_exporter.decoder.loading import load_entry, load_layer
from gsx_exporter.rules.gateskip import GateSkip

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
    """The states of one budget, or of one constant threshold, on their way through the layers."""

    hidden: Tensor
    thresholds: np.ndarray
    kept: np.ndarray
    budget: float = 1.0
    constant: float | None = None
    below: KeyValue | None = None
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
        checkpoint: one with gates or routers.
        ids: [M, S] int64, calibration text.
        budgets: shares in (0, 1].
        options: rule (None: the checkpoint's gates) and K/V policy; the type of the computation is float32.
        on_layer: called with (layers done, layers) as it goes.
    Returns: one point a budget, in their order.
    """
    walk = _Walk(checkpoint, ids, options)
    runs = [walk.run(budget=budget) for budget in budgets]
    walk.through(runs, on_layer)
    return [walk.point(run, run.budget) for run in runs]


def at_constant(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    threshold: float,
    options: DecoderOptions,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> GridPoint:
    """What one threshold keeps everywhere, as a method was trained with it: its budget is the share kept on the text.

    Args: as for `calibrate`; threshold: in the unit of the score.
    """
    walk = _Walk(checkpoint, ids, options)
    run = walk.run(constant=threshold)
    walk.through([run], on_layer)
    point = walk.point(run, 1.0)
    return replace(point, budget=point.kept_share)


class _Walk:
    """A text on its way through the layers, once for each run."""

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, options: DecoderOptions) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        rule = options.rule
        if rule is None:
            assert self.config.gate is not None, "calibration is for models with gates or routers"
            rule = GateSkip(self.config.gate, self.config.eos_ids)
        self.options = DecoderOptions(rule, options.kv_policy, torch.float32)
        self.tokens = torch.from_numpy(ids)
        layers = range(self.config.num_layers) if rule.layers is None else rule.layers
        self.places = [(layer, branch) for layer in layers for branch in BRANCHES if branch in rule.branches]
        with torch.inference_mode():
            positions = torch.arange(ids.shape[1]).expand(self.tokens.shape)
            entry = load_entry(checkpoint, self.options)
            self.hidden, *state = entry(self.tokens, torch.ones_like(self.tokens), positions)
        self.windows = distinct_windows(self.config)
        self.state, entered = state[: 2 + len(self.windows)], state[2 + len(self.windows) :]
        # The thresholds of a layer are what is looked for: the rule is given none.
        self.values = {"thresholds": torch.zeros(2), **dict(zip(rule.entered(), entered, strict=True))}

    def run(self, budget: float = 1.0, constant: float | None = None) -> _Run:
        """A run at the first layer."""
        shape = (self.config.num_layers, 2)
        return _Run(self.hidden, np.full(shape, -np.inf, np.float32), np.ones(shape), budget, constant)

    def through(self, runs: Sequence[_Run], on_layer: Callable[[int, int], None]) -> None:
        """Take runs through all layers, one layer's weights in memory at a time."""
        cos, sin, *masks = self.state
        with torch.inference_mode():
            for i in range(self.config.num_layers):
                layer = load_layer(self.checkpoint, i, self.options)
                call = CallState(cos, sin, masks[self.windows.index(self.config.windows[i])], self.values)
                for run in runs:
                    self._layer(layer, i, run, call)
                on_layer(i + 1, self.config.num_layers)

    def point(self, run: _Run, budget: float) -> GridPoint:
        """What a run found."""
        kept = [run.kept[layer, BRANCHES.index(branch)] for layer, branch in self.places]
        return GridPoint(budget, run.thresholds, run.kept, float(np.mean(kept)))

    def _layer(self, layer: DecoderLayer, number: int, run: _Run, call: CallState) -> None:
        """Take one run's states through one layer, choosing its thresholds on the way."""
        config = self.config
        empty = run.hidden.new_zeros((len(self.tokens), config.num_kv_heads, 0, config.head_dim))
        past = KeyValue(empty, empty)
        kept = self._choose(layer, "attn", number, run, call)
        run.hidden, _, run.below, values = layer.attention_branch(run.hidden, call, past, run.below, kept)
        call = call._replace(values=values)
        kept = self._choose(layer, "mlp", number, run, call)
        run.hidden, _ = layer.mlp_branch(run.hidden, call, kept)

    def _choose(self, layer: DecoderLayer, branch: Branch, number: int, run: _Run, call: CallState) -> Kept | None:
        """The rows that a branch keeps, by the threshold found for it; None where nothing is skipped."""
        if branch not in layer.skippable:
            return None
        assert layer.rule is not None
        normed = layer.normed(branch, run.hidden)
        verdict = layer.rule.judge(layer, branch, run.hidden, normed, call.values)
        scores = verdict.score[~call.values["forced"]].numpy()
        place = (number, BRANCHES.index(branch))
        if branch in layer.rule.chosen:
            left = len(self.places) - self.places.index((number, branch))
            run.thresholds[place] = self._threshold(scores, run, left)
        else:  # it does what the branch before it was told
            run.thresholds[place] = run.thresholds[number, 0]
        tau = float(run.thresholds[place])
        run.kept[place] = float((scores > tau).mean())
        run.owed += run.budget - run.kept[place]
        verdict = replace(verdict, bound=torch.tensor(tau))
        return layer.kept_by(verdict, branch, run.hidden, normed, call)

    @staticmethod
    def _threshold(scores: np.ndarray, run: _Run, left: int) -> float:
        if run.constant is not None:
            return run.constant
        return float(threshold_for(scores, run.budget + run.owed / left)) if run.budget < 1.0 else -math.inf


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
