"""The reference rules of GateSkip: by threshold or by rank (docs/design.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gsx_engines.bundle.counting import kept_count
from gsx_engines.bundle.selection import check_budget
from gsx_exporter.reference.rule import BranchInput, Decision, MaskCall, Masker, Stateless, certain
from gsx_exporter.reference.thresholds import check_thresholds, thresholds_at
from gsx_plugins.errors import UsageError


@dataclass(frozen=True)
class Threshold:
    """Keep a token at a branch when its gate's score exceeds the branch's threshold.

    Args:
        thresholds: [L, 2], or [B, L, 2] with a table for each sequence, float32, columns in the order of
            `BRANCHES`; -inf keeps all.
    """

    thresholds: np.ndarray

    def __post_init__(self) -> None:
        check_thresholds(self.thresholds)

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        if self.thresholds.shape[-2] != call.layers:
            raise UsageError(
                "reference: the thresholds do not fit the model",
                expected=f"{call.layers} rows",
                found=str(self.thresholds.shape[-2]),
            )
        return _ByThreshold(self.thresholds, call)


@dataclass(frozen=True)
class Rank:
    """Keep the best K scores of the call at every branch.

    Args:
        budget: the share to keep, in (0, 1].
    """

    budget: float

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        return _ByRank(self.budget, call)


@dataclass(frozen=True)
class _ByThreshold(Stateless):
    thresholds: np.ndarray
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        call = self.call
        if x.score is None:
            return Decision(call.valid, None, certain(call.valid))
        tau = thresholds_at(self.thresholds, x.layer, x.branch)
        keep = ((_ranked(x.score) > tau) | call.ended) & call.valid
        return Decision(keep, x.score, _open(_apart(x.score, tau), call))


@dataclass(frozen=True)
class _ByRank(Stateless):
    budget: float
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        call = self.call
        if x.score is None:
            return Decision(call.valid, None, certain(call.valid))
        ranked = (call.valid & ~call.ended).flatten()
        score = _ranked(x.score).flatten()
        place = ranked.nonzero().flatten()
        # The sort is stable and tokens are in ascending order, so the earlier of equal scores wins.
        order = score[place].sort(descending=True, stable=True).indices
        best = torch.zeros_like(ranked)
        best[place[order[: kept_count(len(place), self.budget)]]] = True
        kept, skipped = score[best].double(), score[ranked & ~best].double()
        margin = certain(score)
        if len(kept) and len(skipped):
            margin = _apart(score, torch.where(best, skipped.max(), kept.min()))
        keep = (best | call.ended.flatten()).view_as(call.valid)
        return Decision(keep, x.score, _open(margin.view_as(call.valid), call))


def _ranked(score: torch.Tensor) -> torch.Tensor:
    """The score to compare: NaN counts as the lowest."""
    return score.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _apart(score: torch.Tensor, border: torch.Tensor) -> torch.Tensor:
    """How far scores are from where the decision flips, float64; of the score where that is above 1, as logits are:
    a float's rounding error grows with the float."""
    exact = score.double()
    return (exact - border).abs() / exact.abs().clamp(min=1)


def _open(margin: torch.Tensor, call: MaskCall) -> torch.Tensor:
    """Margins, set to infinity where no score decides: padding and end-of-text."""
    return margin.masked_fill(~call.valid | call.ended, float("inf"))
