"""What a keep rule is to the reference: at each branch, which tokens are kept, and how close each decision was.

Shapes are [B, S], the tokens of a call; padding is never kept. Nothing here is shared with the rules that are traced
(`gsx_exporter/decoder/rule.py`): parity compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import Branch

T = TypeVar("T")


class Parts(Protocol):
    """Parts of a checkpoint that a rule reads (its routers, for example), loaded once for each reference."""

    def __call__(self, load: Callable[[Checkpoint], T]) -> T:
        """What `load` makes of the checkpoint."""
        ...


@dataclass(frozen=True)
class MaskCall:
    """The tokens of a call, [B, S] each.

    Args:
        ids: int64. valid: bool, not padding. ended: bool, end-of-text. positions: int64, padding not counted.
        layers: of the model.
        logits_of: states [B, S, H] -> logits [B, S, V], by the model's norm and head.
        parts: of the checkpoint, loaded once.
    """

    ids: torch.Tensor
    valid: torch.Tensor
    ended: torch.Tensor
    positions: torch.Tensor
    layers: int
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    parts: Parts


@dataclass(frozen=True)
class BranchInput:
    """A branch and what it reads.

    Args:
        layer, branch: which.
        residual, normed: [B, S, H], before the branch's norm and after it.
        score: [B, S] float32, of the checkpoint's gate, padding minus infinity; None without one.
    """

    layer: int
    branch: Branch
    residual: torch.Tensor
    normed: torch.Tensor
    score: torch.Tensor | None


@dataclass(frozen=True)
class Decision:
    """Which tokens run a branch.

    Args:
        keep: bool.
        score: float32, what was judged; None where nothing was.
        margin: float64, how far the score is from where the decision turns; infinite where no score decides.
    """

    keep: torch.Tensor
    score: torch.Tensor | None
    margin: torch.Tensor


class Masker(Protocol):
    """A rule at work in one call."""

    def decide(self, x: BranchInput) -> Decision:
        """Which tokens run the branch. Branches come in the model's order."""
        ...

    def added(self, x: BranchInput, decision: Decision, output: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream, [B, S, H]: output is the branch's, of all tokens."""
        ...

    def after(self, x: BranchInput, result: torch.Tensor, decision: Decision) -> None:
        """What came out: result [B, S, H], the residual stream behind the branch."""
        ...


class ReferenceRule(Protocol):
    """A keep rule with its parameters."""

    def start(self, call: MaskCall) -> Masker:
        """The rule on a call."""
        ...


def certain(keep: torch.Tensor) -> torch.Tensor:
    """Margins of decisions that no score turns."""
    return torch.full(keep.shape, float("inf"), dtype=torch.float64)


class KeepsOrDrops:
    """A masker under which a kept token gets the branch's output, and a skipped one nothing."""

    def added(self, x: BranchInput, decision: Decision, output: torch.Tensor) -> torch.Tensor:
        """See `Masker`."""
        return torch.where(decision.keep[..., None], output, 0.0)


class Stateless(KeepsOrDrops):
    """A masker that does not look at what came out."""

    def after(self, x: BranchInput, result: torch.Tensor, decision: Decision) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class KeepAll:
    """Every token runs every branch; gates still multiply what the branches give."""

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        return _All(call)


@dataclass(frozen=True)
class _All(Stateless):
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        return Decision(self.call.valid, x.score, certain(self.call.valid))
