"""The reference rule of CALM: a token exits where the model is confident enough (docs/methods.md section 9)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from gsx_engines.bundle.confidence import Measure
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import EXIT_CLASSIFIER, LOOP_GATE
from gsx_exporter.reference.parts import linear
from gsx_exporter.reference.rule import BranchInput, Decision, KeepsOrDrops, MaskCall, Masker, certain


@dataclass(frozen=True)
class Confident:
    """A token exits after an exit layer once its confidence there is at least its threshold.

    Args:
        exits: depths, ascending.
        measure: `softmax`, `state`, `classifier` or `gate`.
        threshold: lambda, or [B] float32 with one for each sequence; with infinity nothing exits.
        full_until: [B or 1] int64: tokens at a position below it never exit; the token at that position is number 0.
        decay: tau in 0.9 lambda + 0.1 lambda exp(-tau t / N), where t is the token's number; 0 for no decay.
        decay_tokens: N.
    """

    exits: tuple[int, ...]
    measure: Measure
    threshold: float | np.ndarray
    full_until: np.ndarray
    decay: float
    decay_tokens: int

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        number = (call.positions - torch.from_numpy(self.full_until)[:, None]).double()
        share = torch.ones_like(number)
        if self.decay:
            share = 0.9 + 0.1 * torch.exp(-self.decay * number.clamp(min=0) / self.decay_tokens)
        threshold = torch.where(
            number < 0, torch.inf, torch.as_tensor(self.threshold, dtype=torch.float64).reshape(-1, 1) * share
        )
        return _Exiting(self, call, threshold)


@dataclass
class _Exiting(KeepsOrDrops):
    rule: Confident
    call: MaskCall
    threshold: torch.Tensor
    # Each token's confidence at the last exit it ran to; lower than any measure before the first exit.
    confidence: torch.Tensor = field(init=False)
    _entering: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.confidence = torch.full(self.threshold.shape, -2.0, dtype=torch.float64)

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        if x.branch == "attn":
            self._entering = x.residual
        lacking = self.threshold - self.confidence
        keep = (lacking > 0) & self.call.valid
        if bool((self.confidence == -2.0).all()):
            return Decision(keep, self._score(lacking), certain(keep))
        margin = lacking.abs().masked_fill(~self.call.valid, torch.inf)
        return Decision(keep, self._score(lacking), margin)

    def after(self, x: BranchInput, result: torch.Tensor, decision: Decision) -> None:
        """See `Masker`: measures confidence after an exit's layer."""
        depth = x.layer + 1
        measured = self.rule.exits[1:] if self.rule.measure == "state" else self.rule.exits
        if x.branch == "mlp" and depth in measured:
            running = (self.confidence < self.threshold) & self.call.valid
            self.confidence = torch.where(running, self._measured(depth, result), self.confidence)

    def _measured(self, depth: int, state: torch.Tensor) -> torch.Tensor:
        if self.rule.measure == "classifier":
            return self.call.parts(load_classifiers)[depth](state.float())[..., 0].sigmoid().double()
        if self.rule.measure == "gate":
            norm, gate = self.call.parts(load_loop_gate)
            leaving = gate(norm(state.float()))[..., 0].sigmoid().double()
            return 1 - (1 - self.confidence.clamp(min=0)) * (1 - leaving)
        if self.rule.measure == "state":
            assert self._entering is not None
            return torch.nn.functional.cosine_similarity(state, self._entering, dim=-1).double()
        best = self.call.logits_of(state).float().softmax(-1).topk(2, dim=-1).values
        return (best[..., 0] - best[..., 1]).double()

    def _score(self, lacking: torch.Tensor) -> torch.Tensor:
        return lacking.float().masked_fill(~self.call.valid, float("-inf"))


def load_classifiers(checkpoint: Checkpoint) -> dict[int, nn.Linear]:
    """The checkpoint's exit classifiers by depth: states [B, S, H] float32 -> logits [B, S, 1]."""
    return {
        depth: linear(checkpoint, f"model.layers.{depth - 1}.{EXIT_CLASSIFIER}")
        for depth in checkpoint.config.exit_classifiers
    }


def load_loop_gate(checkpoint: Checkpoint) -> tuple[nn.Module, nn.Linear]:
    """The norm behind each loop, and the exit gate: states [B, S, H] float32 -> logits [B, S, 1]."""
    weight = checkpoint.tensor("model.norm.weight").float()
    norm = nn.RMSNorm(len(weight), eps=checkpoint.config.rms_norm_eps)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    return norm, linear(checkpoint, f"model.{LOOP_GATE}")
