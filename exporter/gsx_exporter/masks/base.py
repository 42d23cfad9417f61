"""What a keep rule is to the reference: at each branch, who is kept, and how near the choice was.

Shapes are [B, S], the tokens of a call; padding is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from gsx_exporter.config import Branch

if TYPE_CHECKING:
    from gsx_exporter.masks.router import Routers


@dataclass(frozen=True)
class MaskCall:
    """The tokens of a call, [B, S] each.

    Args:
        ids: int64. valid: bool, not padding. ended: bool, end-of-text. positions: int64, padding not counted.
        layers: of the model.
        logits_of: states [B, S, H] -> logits [B, S, V], by the model's norm and head.
        routers: the checkpoint's; None without.
        exit_classifiers: the checkpoint's, by depth: states [B, S, H] float32 -> logits [B, S, 1].
    """

    ids: torch.Tensor
    valid: torch.Tensor
    ended: torch.Tensor
    positions: torch.Tensor
    layers: int
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    routers: Routers | None = None
    exit_classifiers: Mapping[int, torch.nn.Module] = field(default_factory=dict)


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
class Choice:
    """Who runs a branch.

    Args:
        keep: bool.
        score: float32, what was judged; None where nothing was.
        margin: float64, how far the score is from where the choice turns; infinite where nothing turns it.
    """

    keep: torch.Tensor
    score: torch.Tensor | None
    margin: torch.Tensor


class Chooser(Protocol):
    """A rule at work in one call."""

    def choose(self, x: BranchInput) -> Choice:
        """Who runs the branch. Branches come in the model's order."""
        ...

    def added(self, x: BranchInput, choice: Choice, output: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream, [B, S, H]: output is the branch's, of all tokens."""
        ...

    def after(self, x: BranchInput, result: torch.Tensor, choice: Choice) -> None:
        """What came out: result [B, S, H], the residual stream behind the branch."""
        ...


class MaskRule(Protocol):
    """A keep rule with its parameters."""

    def begin(self, call: MaskCall) -> Chooser:
        """The rule on a call."""
        ...


def certain(keep: torch.Tensor) -> torch.Tensor:
    """Margins of a choice that nothing turns."""
    return torch.full(keep.shape, float("inf"), dtype=torch.float64)


class Plain:
    """A chooser under which a kept token gets the branch's output, and a skipped one nothing."""

    def added(self, x: BranchInput, choice: Choice, output: torch.Tensor) -> torch.Tensor:
        """See `Chooser`."""
        return torch.where(choice.keep[..., None], output, 0.0)


class Stateless(Plain):
    """A chooser that does not look at what came out."""

    def after(self, x: BranchInput, result: torch.Tensor, choice: Choice) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class KeepAll:
    """Every token runs every branch; gates still multiply what the branches give."""

    def begin(self, call: MaskCall) -> Chooser:
        """See `MaskRule`."""
        return _All(call)


@dataclass(frozen=True)
class _All(Stateless):
    call: MaskCall

    def choose(self, x: BranchInput) -> Choice:
        """See `Chooser`."""
        return Choice(self.call.valid, x.score, certain(self.call.valid))
