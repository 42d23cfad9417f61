"""CALM (arXiv:2207.07061): a token exits at the first listed exit where the model is confident enough.

After each exit layer, the tokens that are still running get a confidence. A token whose confidence reaches the
threshold skips every branch above. Its state passes unchanged, so K and V of the layers above are computed from the
exit state: CALM's state propagation, which is the K/V policy `compute`. Sorted LLaMA's dynamic mode (arXiv:2309.08968)
is the softmax measure at its exits. Facts: docs/methods.md section 9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gsx_engines.bundle.confidence import Measure
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.ends import Exit
from gsx_exporter.decoder.modules import Linear
from gsx_exporter.decoder.norm import norm_of
from gsx_exporter.decoder.rule import BranchInput, BranchScore, LooksAtExits, Tokens, TracedRule, Value, Values
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.threshold_gather.op import threshold_gather

# Confidence of a token before its first exit: below every measure.
NOT_MEASURED = -2.0
# The share of the threshold that decays (released code: 0.9 lambda + 0.1 lambda exp(-tau t / N)).
DECAYING = 0.1


@dataclass(frozen=True)
class Calm(TracedRule, LooksAtExits):
    """Keep a token until its confidence at an exit reaches its threshold.

    Args:
        exits: numbers of layers after which tokens may exit, below the model's depth.
        measure: `softmax`, the difference in probability of the two most likely next tokens, by the model's own norm
            and head; `state`, the cosine of the states before and after the exit's layer, with which no token exits at
            the first exit; `classifier`, the checkpoint's trained classifier after the exit's layer; `gate`, the
            probability of having left that a looped model's own exit gate gives (Ouro).
        decay: tau; 0 for a constant threshold.
        decay_tokens: N, the number of tokens over which the threshold decays.
    """

    exits: tuple[int, ...]
    measure: Measure
    decay: float = 0.0
    decay_tokens: int = 1

    @property
    def branches(self) -> tuple[Branch, ...]:
        return BRANCHES

    @property
    def inputs(self) -> Mapping[str, Value]:
        return {"exit_threshold": Value(torch.float32, ("B",)), "full_until": Value(torch.int64, ("B",))}

    @property
    def call(self) -> Mapping[str, Value]:
        return {"leaves_at": Value(torch.float32, ("N",))}

    @property
    def carried(self) -> Mapping[str, Value]:
        return {"confidence": Value(torch.float32, ("N", 1))}

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Each token's own threshold: decayed by its number in the generation, infinite if it runs in full."""
        number = tokens.positions - inputs["full_until"].unsqueeze(1)
        threshold = inputs["exit_threshold"].unsqueeze(1).expand(number.shape)
        if self.decay:
            late = torch.exp(number.clamp(min=0).to(torch.float32) * (-self.decay / self.decay_tokens))
            threshold = threshold * ((1 - DECAYING) + DECAYING * late)
        infinity = torch.tensor(float("inf"))
        own = torch.where(number < 0, infinity, threshold).reshape(-1)
        return {
            "leaves_at": torch.where(tokens.valid, own, -infinity),
            "confidence": torch.full_like(own, NOT_MEASURED).unsqueeze(1),
        }

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The score is the threshold minus the confidence: positive while the token runs."""
        return BranchScore(values["leaves_at"] - values["confidence"].squeeze(1), torch.tensor(0.0))

    def exit_depths(self) -> tuple[int, ...]:
        """See `LooksAtExits`: no token exits at the first exit by `state` (docs/methods.md section 9)."""
        return self.exits[1:] if self.measure == "state" else self.exits

    def exit_module(self, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
        """See `LooksAtExits`."""
        if self.measure == "softmax":
            return SoftmaxGap(config, dtype)
        if self.measure == "gate":
            return LoopGate(config, dtype)
        return Saturation() if self.measure == "state" else ExitClassifier(config)

    def exit_prefix(self, depth: int) -> str:
        """See `LooksAtExits`: each exit has its own classifier."""
        return f"layers.{depth - 1}." if self.measure == "classifier" else ""


class SoftmaxGap(Exit):
    """How confident the model is of the next token here. Norm and head run only for tokens that are still running."""

    def forward(self, hidden: Tensor, entering: Tensor, leaves_at: Tensor, confidence: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        """hidden [N, H], the exit state -> confidence [N, 1] float32; unchanged for tokens that have exited."""
        lacking = leaves_at - confidence.squeeze(1)
        rows, index, _ = threshold_gather(hidden, lacking, torch.tensor(0.0))
        probabilities = torch.softmax(self.logits(rows).to(torch.float32), dim=-1)
        two = torch.topk(probabilities, 2, dim=-1).values
        gap = two[:, :1] - two[:, 1:]
        exited = torch.where(lacking.unsqueeze(1) > 0, torch.zeros_like(confidence), confidence)
        return (gated_scatter_add(exited, gap, torch.ones_like(gap), index),)


class Saturation(nn.Module):
    """How little the exit's layer changed a token's state."""

    def forward(self, hidden: Tensor, entering: Tensor, leaves_at: Tensor, confidence: Tensor) -> tuple[Tensor]:
        """hidden, entering [N, H], the states after and before the layer -> confidence [N, 1] float32."""
        cosine = torch.nn.functional.cosine_similarity(hidden.to(torch.float32), entering.to(torch.float32), dim=-1)
        return (torch.where(leaves_at.unsqueeze(1) > confidence, cosine.unsqueeze(1), confidence),)


class ExitClassifier(nn.Module):
    """The trained probability that the layers above would not change the next token (arXiv:2207.07061 section 3.5).

    It runs for all tokens: it is too little work to gather rows for. In float32, like everything that decides.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.exit_classifier = Linear(config.hidden_size, 1, True, torch.float32)

    def forward(self, hidden: Tensor, entering: Tensor, leaves_at: Tensor, confidence: Tensor) -> tuple[Tensor]:
        """hidden [N, H], the exit state -> confidence [N, 1] float32; unchanged for tokens that have exited."""
        probability = torch.sigmoid(self.exit_classifier(hidden.to(torch.float32)))
        return (torch.where(leaves_at.unsqueeze(1) > confidence, probability, confidence),)


class LoopGate(nn.Module):
    """The probability of having left by this loop: Ouro's exit gate on what each loop gives (arXiv:2510.25741).

    The gate gives the probability of leaving now, for those that are still there: 1 - (1 - before)(1 - now).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm_of(config, config.hidden_size, dtype)
        self.early_exit_gate = Linear(config.hidden_size, 1, True, torch.float32)

    def forward(self, hidden: Tensor, entering: Tensor, leaves_at: Tensor, confidence: Tensor) -> tuple[Tensor]:
        """hidden [N, H], the loop's last state -> confidence [N, 1] float32; unchanged for tokens that have left."""
        leaving = torch.sigmoid(self.early_exit_gate(self.norm(hidden).to(torch.float32)))
        left = 1 - (1 - confidence.clamp(min=0)) * (1 - leaving)
        return (torch.where(leaves_at.unsqueeze(1) > confidence, left, confidence),)
