"""Linear scores for vector gates: what decides about a token, without the product that a kept token needs.

GateSkip's vector gate is g = sigmoid(W x + b), W [H, H], and a token is kept where the mean of g exceeds a threshold.
So every token pays for W, also one that is skipped. The logit of that mean is nearly linear in x: on the example model
a linear function of x, fitted by least squares, ranks tokens with a Spearman correlation of 0.987 (mean over 32 gates,
the least 0.971), where the mean over a quarter of the gate's outputs reaches 0.92 (benchmarks/RESULTS.md). It takes H
multiplications in place of H x H. With it (`gsx.gate.score: linear`) W is read for kept tokens only, and thresholds are
calibrated on these scores, so that a budget keeps its share.

The model is frozen, and the fit is a ridge regression, so the same text gives the same scores. It sees the states that
it will meet: those of several budgets, whose tokens skip by the exact scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsx_engines.bundle.bundle import writing
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import GATE_SCORE
from gsx_exporter.convert import SLACK_BYTES
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.rule import BranchInput, BranchScore, Values
from gsx_exporter.defaults import CLASSIFIER_TOKENS
from gsx_exporter.rules.calibration import ThresholdWalk
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.training.frozen import learnt_windows, text_windows, write_with
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# The states of these budgets are fitted to, all with the same weight.
BUDGETS = (1.0, 0.75, 0.5)
# Added to the variances of x, as a share of their mean: with fewer tokens than inputs there is no one solution.
_RIDGE = 1e-4
# Means of a gate this near to 0 or 1 have no logit in float32.
_EDGE = 1e-6


@dataclass(frozen=True)
class LinearScore:
    """The linear score of one gate.

    Args:
        layer, branch: which gate.
        weight, bias: [1, H], [1] float32.
        agreement: of the held-out tokens, the share that it puts into the same half as the exact score does.
    """

    layer: int
    branch: Branch
    weight: Tensor
    bias: Tensor
    agreement: float


@dataclass(frozen=True)
class LinearScoresResult:
    """A checkpoint with linear scores.

    Args:
        directory: where it is stored.
        tokens: number of tokens of the text, including held-out ones.
        scores: by layer, then by branch.
    """

    directory: Path
    tokens: int
    scores: tuple[LinearScore, ...]


def train_linear_scores(
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = CLASSIFIER_TOKENS,
    on_progress: OnProgress = silent,
) -> LinearScoresResult:
    """Fit a linear score for each vector gate of a checkpoint, and write the checkpoint with them.

    Args:
        model: a directory or a hub id; its weights are not changed.
        out: the new checkpoint's directory, which must be new or empty; it is written completely or not at all.
        text: a directory of text files; None for the standard library of the running Python.
        tokens: largest number of tokens of the text to use.
        on_progress: called before each step.
    Returns: the checkpoint's directory, and how often each score decides as the gate itself would.
    Raises:
        UsageError: out is not empty, or the model has no vector gates.
        CheckpointError, TextError: model or text cannot be used.
    Example:
        >>> result = gsx.train_linear_scores("my-model", "out/with-scores", text="my-texts", tokens=8192)
        >>> result.scores[0].branch
        'attn'
    """
    out = Path(out)
    on_progress(Progress("checking the checkpoint"))
    checkpoint = open_checkpoint(model)
    gate = checkpoint.config.gate
    if gate is None or gate.kind != "vector":
        raise UsageError(
            f"{checkpoint.source}: linear scores are for vector gates",
            expected="a checkpoint with vector gates, as GateSkip publishes them",
            found="scalar gates, which cost almost nothing" if gate else "a model without gates",
        )
    with writing(out, overwrite=False, needed_bytes=checkpoint.weight_bytes() + SLACK_BYTES) as work:
        on_progress(Progress("reading the text"))
        ids = text_windows(checkpoint, None if text is None else Path(text), tokens)
        found = fit_linear_scores(checkpoint, ids, on_progress)
        own: dict[str, Tensor] = {}
        for one in found:
            prefix = f"model.layers.{one.layer}.{one.branch}_{GATE_SCORE}"
            own |= {f"{prefix}.weight": one.weight.contiguous(), f"{prefix}.bias": one.bias}
        section = {"gate": replace(gate, score="linear").to_dict()}
        write_with(checkpoint, own, work, on_progress, section=section, without=f"_{GATE_SCORE}.")
    return LinearScoresResult(out, int(ids.size), found)


def fit_linear_scores(
    checkpoint: Checkpoint, ids: np.ndarray, on_progress: OnProgress = silent
) -> tuple[LinearScore, ...]:
    """Fit one score for each gate, in one pass over a text; one layer is in memory at a time.

    Args:
        checkpoint: a model with vector gates; linear scores that it has are not read.
        ids: [M, S] int64, without padding; the last windows are held out.
        on_progress: called after each layer.
    """
    config = checkpoint.config
    assert config.gate is not None, "the checkpoint has gates"
    exact = replace(checkpoint, config=replace(config, gate=replace(config.gate, score="mean")))
    walk = _FittingWalk(exact, ids, DecoderOptions(GateSkip.of(exact.config)))
    walk.through([walk.run(budget=budget) for budget in BUDGETS], "fitting", on_progress)
    return walk.finished()


class _FittingWalk(ThresholdWalk):
    """A calibration whose scores are fitted to on the way, a layer at a time."""

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray, options: DecoderOptions) -> None:
        super().__init__(checkpoint, ids, options)
        gate = checkpoint.config.gate
        assert gate is not None
        self._reads_normed = gate.input == "post_norm"
        self._fit_on = learnt_windows(len(ids)) * ids.shape[1]
        self._layer = 0
        self._sums: dict[Branch, _Sums] = {}
        self._done: list[LinearScore] = []

    def score(self, number: int, x: BranchInput, values: Values) -> BranchScore:
        """See `ThresholdWalk`; the exact score, which is also learnt from."""
        if number != self._layer:
            self._solve()
            self._layer = number
        gate, mean = x.gate()
        self._sums.setdefault(x.branch, _Sums()).add(
            x.normed if self._reads_normed else x.hidden, mean, values["forced"], self._fit_on
        )
        known = replace(x, gate=lambda: (gate, mean))
        return super().score(number, known, values)

    def finished(self) -> tuple[LinearScore, ...]:
        """All scores, after the last layer."""
        self._solve()
        return tuple(self._done)

    def _solve(self) -> None:
        for branch, sums in self._sums.items():
            weight, bias = sums.solution()
            self._done.append(LinearScore(self._layer, branch, weight, bias, sums.agreement(weight, bias)))
        self._sums = {}


class _Sums:
    """What a ridge regression needs of the tokens of several runs, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._x = self._y = self._xx = self._xy = torch.zeros((), dtype=torch.float64)
        self._held: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, mean: Tensor, forced: Tensor, fit_on: int) -> None:
        """Args: x [N, H]; mean [N], of the gate; forced [N] bool, tokens that no score decides; fit_on: the first N."""
        learnt = ~forced[:fit_on]
        rows = x[:fit_on][learnt].double()
        wanted = torch.logit(mean[:fit_on][learnt].double(), eps=_EDGE)
        self._count += len(rows)
        self._x = self._x + rows.sum(0)
        self._y = self._y + wanted.sum()
        self._xx = self._xx + rows.t() @ rows
        self._xy = self._xy + rows.t() @ wanted
        held = ~forced[fit_on:]
        self._held.append((x[fit_on:][held].clone(), mean[fit_on:][held].clone()))

    def solution(self) -> tuple[Tensor, Tensor]:
        """weight [1, H], bias [1] float32: the least mean square error, and a little ridge."""
        x, y = self._x / self._count, self._y / self._count
        spread = self._xx / self._count - torch.outer(x, x)
        spread += torch.eye(len(x), dtype=torch.float64) * (_RIDGE * spread.diagonal().mean() + 1e-30)
        weight = torch.linalg.solve(spread, self._xy / self._count - x * y)
        return weight[None].float(), (y - weight @ x)[None].float()

    def agreement(self, weight: Tensor, bias: Tensor) -> float:
        """Of the held-out tokens, the share that both scores put into the same half, over all runs."""
        same = total = 0
        for x, mean in self._held:
            if not len(x):
                continue
            score = (x.float() @ weight.t() + bias)[:, 0]
            same += int(((score > score.median()) == (mean > mean.median())).sum())
            total += len(x)
        return same / total if total else float("nan")
