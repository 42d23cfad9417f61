"""The reference rule of the number of loops, one for each sequence (docs/methods.md section 11)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gsx_engines.bundle.loops import Loops
from gsx_exporter.reference.rule import BranchInput, Decision, MaskCall, Masker, Stateless, certain


@dataclass(frozen=True)
class CountedLoops:
    """A visit runs for a sequence if its loop is one of the sequence's.

    Args: loops: [B or 1] int64.
    """

    loops: np.ndarray

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        assert call.loops is not None
        return _Counted(torch.from_numpy(self.loops), call.loops, call)


@dataclass(frozen=True)
class _Counted(Stateless):
    loops: torch.Tensor
    shape: Loops
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`. Visits that always run have no score."""
        valid, loop = self.call.valid, self.shape.loop_of(x.layer)
        if not loop:
            return Decision(valid, None, certain(valid))
        runs = (loop < self.loops)[:, None]
        keep = runs & valid
        score = runs.float().expand_as(keep).masked_fill(~valid, float("-inf"))
        return Decision(keep, score, certain(keep))
