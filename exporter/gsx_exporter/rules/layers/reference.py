"""The reference rule of sets of layers, one set per sequence (docs/methods.md sections 6 to 8)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.reference.rule import BranchInput, Decision, MaskCall, Masker, Stateless, certain


@dataclass(frozen=True)
class LayerMask:
    """A branch runs for a sequence if the sequence's mask says so, and always for tokens at its first positions.

    Args:
        mask: [B or 1, L, 2] float32: 1 to run a branch, 0 to skip it.
        full_until: [B or 1] int64: tokens at a position below it run every branch.
    """

    mask: np.ndarray
    full_until: np.ndarray

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        return _ByMask(torch.from_numpy(self.mask) > 0, torch.from_numpy(self.full_until), call)


@dataclass(frozen=True)
class _ByMask(Stateless):
    runs: torch.Tensor
    full_until: torch.Tensor
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        call = self.call
        named = self.runs[:, x.layer, BRANCHES.index(x.branch)][:, None]
        keep = (named | (call.positions < self.full_until[:, None])) & call.valid
        score = named.float().expand_as(keep).masked_fill(~call.valid, float("-inf"))
        return Decision(keep, score, certain(keep))
