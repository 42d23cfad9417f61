"""Thresholds for a grid of budgets, in one walk through the model.

Skipping changes the inputs of later layers, and so their scores. The calibration therefore goes layer by layer: a
branch's threshold is the quantile of its scores that keeps its share of the budget (the same for all branches, or as
the rule divides it), on states from earlier branches that already skip. Equal
scores (at the first branch a score depends only on the token's id, and texts repeat tokens) can make a share impossible
to meet at one branch. Later branches make up for the difference, so that the share kept over all branches meets the
budget; that share is counted, not assumed. Rule: docs/design.md, section 3, GateSkip `threshold`.

One layer's weights are in memory at a time. Every budget has its own states, and all go through a layer together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, KeptRows
from gsx_exporter.decoder.rule import BranchInput, BranchScore, DividesBudget, Values, scored_branches
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.gate_shares import kept_shares
from gsx_plugins.progress import OnProgress, Progress, silent

# Scores closer than this may be the same score, rounded differently: they are kept or skipped together.
TIE = 4e-6
# By how much a threshold may miss the share for the sake of a wider gap between scores (the budget allows 0.01).
NEAR_SHARE = 0.002


@dataclass(frozen=True)
class CalibratedPoint:
    """One budget's thresholds and what they keep.

    Args:
        budget: the wanted share.
        thresholds: [L, 2] float32 (attn, mlp); -inf where everything is kept, also at a branch that the rule never
            skips.
        kept: [L, 2] float64, the share of tokens kept on the calibration text; 1 at a branch that is never skipped.
        kept_share: mean of `kept` over the branches that the rule may skip.
    """

    budget: float
    thresholds: np.ndarray
    kept: np.ndarray
    kept_share: float


@dataclass
class CalibrationRun:
    """The states of one budget, or of one constant threshold, on their way through the layers."""

    stream: Stream
    thresholds: np.ndarray
    kept: np.ndarray
    shares: list[float]
    budget: float = 1.0
    constant: float | None = None
    owed: float = 0.0
    """By how much the shares kept so far fall short of what they were to be, summed over the branches."""


def calibrate(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    budgets: Sequence[float],
    options: DecoderOptions,
    on_progress: OnProgress = silent,
) -> list[CalibratedPoint]:
    """Thresholds for each budget.

    Args:
        checkpoint: the model.
        ids: [M, S] int64, calibration text.
        budgets: shares in (0, 1].
        options: a rule with scores, and the K/V policy; the computation is in float32.
        on_progress: called after each layer.
    Returns: one point per budget, in their order.
    """
    walk = ThresholdWalk(checkpoint, ids, options)
    runs = [walk.run(budget=budget) for budget in budgets]
    walk.through(runs, "calibrating", on_progress)
    return [walk.point(run, run.budget) for run in runs]


def at_constant(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    threshold: float,
    options: DecoderOptions,
    on_progress: OnProgress = silent,
) -> CalibratedPoint:
    """What a method's own threshold, the same at every branch, keeps. The point's budget is the share kept on the text.

    Args: as for `calibrate`; threshold: in the unit of the score.
    """
    walk = ThresholdWalk(checkpoint, ids, options)
    run = walk.run(constant=threshold)
    walk.through([run], "counting what is kept", on_progress)
    point = walk.point(run, 1.0)
    return replace(point, budget=point.kept_share)


class ThresholdWalk:
    """A text on its way through the layers, once for each run, and the thresholds that are calibrated on the way."""

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, options: DecoderOptions) -> None:
        rule = options.rule
        assert rule is not None, "calibration is for rules with scores"
        layers = range(checkpoint.config.num_layers) if rule.layers is None else rule.layers
        self._places = [(layer, branch) for layer in layers for branch in BRANCHES if branch in rule.branches]
        self._weights = [rule.skip_weight(*place) if isinstance(rule, DividesBudget) else 1.0 for place in self._places]
        self._rule = rule
        with torch.inference_mode():
            self._walk = Walk(checkpoint, ids, options)

    def run(self, budget: float = 1.0, constant: float | None = None) -> CalibrationRun:
        """A run at the first layer."""
        shape = (self._walk.checkpoint.config.num_layers, 2)
        shares = kept_shares(self._weights, budget)
        with torch.inference_mode():
            # The rule needs thresholds as input, but they are not used: `_choose` replaces the bound.
            stream = self._walk.stream({"thresholds": np.zeros((1, *shape), np.float32)})
        return CalibrationRun(stream, np.full(shape, -np.inf, np.float32), np.ones(shape), shares, budget, constant)

    def through(self, runs: Sequence[CalibrationRun], stage: str, on_progress: OnProgress) -> None:
        """Take runs through all layers, one layer's weights in memory at a time."""
        layers = self._walk.checkpoint.config.num_layers
        with torch.inference_mode():
            for number, layer in self._walk.layers():
                for run in runs:
                    self._walk.through(number, layer, run.stream, functools.partial(self._choose, number, run))
                on_progress(Progress(stage, number + 1, layers))

    def point(self, run: CalibrationRun, budget: float) -> CalibratedPoint:
        """The result of a run."""
        kept = [run.kept[layer, BRANCHES.index(branch)] for layer, branch in self._places]
        return CalibratedPoint(budget, run.thresholds, run.kept, float(np.mean(kept)))

    def score(self, number: int, x: BranchInput, values: Values) -> BranchScore:
        """What decides at a branch of a layer."""
        return self._rule.score(x, values)

    def _choose(
        self,
        number: int,
        run: CalibrationRun,
        layer: DecoderLayer,
        branch: Branch,
        hidden: Tensor,
        normed: Tensor,
        call: CallState,
    ) -> KeptRows:
        """The rows that a branch keeps by the threshold that is calibrated for it here."""
        x = layer.branch_input(branch, hidden, normed)
        found = self.score(number, x, call.values)
        scores = found.score[~call.values["forced"]].numpy()
        place, which = (number, BRANCHES.index(branch)), self._places.index((number, branch))
        if branch in scored_branches(self._rule):
            run.thresholds[place] = self._threshold(scores, run, which)
        else:  # it follows the branch before it
            run.thresholds[place] = run.thresholds[number, 0]
        tau = float(run.thresholds[place])
        run.kept[place] = float((scores > tau).mean())
        run.owed += run.shares[which] - run.kept[place]
        return layer.kept_by(replace(found, bound=torch.tensor(tau)), x, call)

    def _threshold(self, scores: np.ndarray, run: CalibrationRun, which: int) -> float:
        if run.constant is not None:
            return run.constant
        if run.budget >= 1.0 or not self._weights[which]:
            return -math.inf
        left = sum(weight > 0.0 for weight in self._weights[which:])
        return float(threshold_for(scores, run.shares[which] + run.owed / left))


def threshold_for(scores: np.ndarray, share: float) -> np.float32:
    """The threshold that keeps a share of the scores: their (1 - share) quantile, at a distance from any score.

    With a threshold equal to a score, rounding would decide about that token, and at the first branch about every token
    with the same id. So the threshold is in the middle of the widest gap near the quantile. If the quantile is among
    equal scores, either all of them are kept or all are skipped, whichever is closer to the share. Where all scores are
    equal, the rule cannot choose, and keeps all.

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
    if n and ordered[-1] - ordered[0] < TIE:
        return np.float32(ordered[0] - TIE)
    if gaps[cut] < TIE:
        clear = np.flatnonzero(gaps >= TIE)
        cut = clear[distance[clear].argmin()]
    if cut == 0:
        return np.float32(ordered[0] - TIE)
    if cut == n:
        return np.float32(ordered[-1] + TIE)
    return np.float32((ordered[cut - 1] + ordered[cut]) / 2)
