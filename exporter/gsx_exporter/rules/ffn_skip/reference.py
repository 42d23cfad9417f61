"""The reference rule of FFN-SkipLLM, token by token as the method defines it (docs/methods.md section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.reference.rule import BranchInput, Decision, KeepsOrDrops, MaskCall, Masker, certain
from gsx_exporter.reference.thresholds import check_thresholds, thresholds_at


@dataclass(frozen=True)
class FfnStride:
    """After an FFN that hardly changed a token's state, the FFNs of the next layers are skipped.

    Args:
        thresholds: [L, 2], or [B, L, 2] with a table for each sequence, float32; in the MLP's column, the largest
            change, 1 - cosine, that counts as hardly any; minus infinity for cold layers.
        stride: number of FFNs that are then skipped.
        full_until: [B or 1] int64: tokens at a position below it run every FFN.
    """

    thresholds: np.ndarray
    stride: int
    full_until: np.ndarray

    def __post_init__(self) -> None:
        check_thresholds(self.thresholds)

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        full = call.positions < torch.from_numpy(self.full_until)[:, None]
        return _Striding(self.thresholds, self.stride, full, call)


class _Striding(KeepsOrDrops):
    def __init__(self, thresholds: np.ndarray, stride: int, full: torch.Tensor, call: MaskCall) -> None:
        self._thresholds, self._stride, self._full, self._call = thresholds, stride, full, call
        # For each token: the number of FFNs still to skip, and how far its last change was from the threshold.
        self._skips = torch.zeros(call.valid.shape, dtype=torch.int64)
        self._excess = certain(call.valid)
        self._fresh = torch.zeros_like(call.valid)

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        valid = self._call.valid
        if BRANCHES[1] != x.branch:
            return Decision(valid, None, certain(valid))
        always = self._full | torch.isneginf(thresholds_at(self._thresholds, x.layer, x.branch))
        skip = (self._skips > 0) & ~always
        decided = (skip | self._fresh) & ~always & valid
        margin = torch.where(decided, self._excess.abs(), certain(valid))
        score = torch.where(decided, self._excess, certain(valid)).float()
        return Decision(valid & ~skip, score, margin)

    def after(self, x: BranchInput, result: torch.Tensor, decision: Decision) -> None:
        """See `Masker`: measures the change of tokens that ran their FFN; the others have one FFN fewer to skip."""
        if BRANCHES[1] != x.branch:
            return
        before, now = x.residual.double(), result.double()
        cosine = (before * now).sum(-1) / (before.norm(dim=-1) * now.norm(dim=-1))
        excess = 1 - cosine - thresholds_at(self._thresholds, x.layer, x.branch)
        ran = decision.keep
        skips = torch.where(excess <= 0, self._stride, 0)
        self._skips = torch.where(ran, skips, (self._skips - 1).clamp(min=0))
        self._excess = torch.where(ran, excess, self._excess)
        self._fresh = ran & (excess > 0)
