"""The same rule by masks, for `gsx verify`. It shares no code with the traced rule: verification compares the two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gsx_engines.bundle.words import Branch
from gsx_exporter.reference.rule import BranchInput, Decision, MaskCall, Masker, Stateless, certain
from gsx_exporter.reference.thresholds import thresholds_at


@dataclass(frozen=True)
class LargeStates:
    """Keep the states above a threshold.

    Args:
        thresholds: [L, 2], or [B, L, 2] with a table for each sequence, float32, columns attn and mlp; minus infinity
            keeps all.
        skipped: the branches that may be skipped.
    """

    thresholds: np.ndarray
    skipped: tuple[Branch, ...]

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        return _Masker(self, call)


@dataclass(frozen=True)
class _Masker(Stateless):
    rule: LargeStates
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        valid = self.call.valid
        if x.branch not in self.rule.skipped:
            return Decision(valid, None, certain(valid))
        threshold = thresholds_at(self.rule.thresholds, x.layer, x.branch)
        size = torch.linalg.vector_norm(x.residual.double(), dim=-1) / x.residual.shape[-1] ** 0.5
        score = size.masked_fill(~valid, -torch.inf)
        margin = (score - threshold).abs().masked_fill(~valid, torch.inf)
        return Decision((score > threshold) & valid, score.float(), margin)
