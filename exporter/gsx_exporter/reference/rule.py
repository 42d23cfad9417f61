"""Reference rules: at each branch, which tokens a keep rule keeps, and how close each decision was.

Shapes are [B, S], the tokens of a call; padding is never kept. Nothing here is shared with traced rules
(`gsx_exporter/decoder/rule.py`): parity compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint

T = TypeVar("T")


class Parts(Protocol):
    """Parts of a checkpoint that a rule reads (its routers, for example), loaded once per reference."""

    def __call__(self, load: Callable[[Checkpoint], T]) -> T:
        """The result of `load(checkpoint)`, cached by `load`."""
        ...


@dataclass(frozen=True)
class MaskCall:
    """The tokens of a call, [B, S] each.

    Args:
        ids: int64.
        valid: bool, false for padding.
        ended: bool, true for end-of-text.
        positions: int64, padding not counted.
        layers: number of layers of the model; in a looped one, of visits.
        loops: how the layers of a looped model run; None where each runs once.
        logits_of: states [B, S, H] -> logits [B, S, V], by the model's final norm and head.
        parts: of the checkpoint, loaded once.
    """

    ids: torch.Tensor
    valid: torch.Tensor
    ended: torch.Tensor
    positions: torch.Tensor
    layers: int
    loops: Loops | None
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    parts: Parts


@dataclass(frozen=True)
class BranchInput:
    """A branch and what it reads.

    Args:
        layer, branch: number and name.
        residual, normed: [B, S, H], before and after the branch's norm.
        score: [B, S] float32, that of the checkpoint's gate, minus infinity for padding; None without a gate.
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
        keep: [B, S] bool.
        score: [B, S] float32, the score that decided; None if no score did.
        margin: [B, S] float64, how far the score is from the point where the decision flips, of the score's size where
            that can be above 1; infinite if no score decides.
    """

    keep: torch.Tensor
    score: torch.Tensor | None
    margin: torch.Tensor


class Masker(Protocol):
    """A reference rule within one call."""

    def decide(self, x: BranchInput) -> Decision:
        """Which tokens run the branch. Branches come in the model's order."""
        ...

    def added(self, x: BranchInput, decision: Decision, output: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream, [B, S, H]. Args: output: of the branch, for all tokens, [B, S, H]."""
        ...

    def after(self, x: BranchInput, result: torch.Tensor, decision: Decision) -> None:
        """Called after the branch. Args: result: [B, S, H], the residual stream after it."""
        ...


class ReferenceRule(Protocol):
    """A keep rule with its parameters."""

    def start(self, call: MaskCall) -> Masker:
        """Begin a call."""
        ...


def certain(keep: torch.Tensor) -> torch.Tensor:
    """Margins of decisions that do not depend on a score: infinity, in the shape of keep, float64."""
    return torch.full(keep.shape, float("inf"), dtype=torch.float64)


class KeepsOrDrops:
    """A masker with which a kept token gets the branch's output, and a skipped one nothing."""

    def added(self, x: BranchInput, decision: Decision, output: torch.Tensor) -> torch.Tensor:
        """See `Masker`."""
        return torch.where(decision.keep[..., None], output, 0.0)


class Stateless(KeepsOrDrops):
    """A masker that does not use the branch's result."""

    def after(self, x: BranchInput, result: torch.Tensor, decision: Decision) -> None:
        """See `Masker`: nothing to do."""


@dataclass(frozen=True)
class KeepAll:
    """Every token runs every branch; gates still multiply the branches' outputs."""

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        return _All(call)


@dataclass(frozen=True)
class _All(Stateless):
    call: MaskCall

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        return Decision(self.call.valid, x.score, certain(self.call.valid))
