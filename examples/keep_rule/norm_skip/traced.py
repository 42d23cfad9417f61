"""The rule as the exporter traces it: the score is the root mean square of a token's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gsx_engines.bundle.words import Branch
from gsx_exporter.decoder.rule import (
    BranchInput,
    BranchScore,
    Tokens,
    TracedRule,
    Value,
    Values,
    apply_forced,
    forced,
)
from gsx_exporter.rules.scores import bound_of, by_token, call_values, selection_inputs, whole_inputs


@dataclass(frozen=True)
class NormSkip(TracedRule):
    """Keep a token at a branch where its state is larger than the branch's threshold.

    Args:
        skipped: the branches that may be skipped.
    """

    skipped: tuple[Branch, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.skipped

    @property
    def inputs(self) -> Mapping[str, Value]:
        return selection_inputs("threshold")

    @property
    def whole(self) -> frozenset[str]:
        return whole_inputs("threshold")

    @property
    def call(self) -> Mapping[str, Value]:
        return call_values("threshold")

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Padding is never kept; nothing must run."""
        nothing = torch.zeros_like(tokens.valid)
        return {**forced(tokens, nothing), "bounds": by_token(tokens, inputs["thresholds"])}

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """hidden [N, H] -> score [N] float32."""
        size = x.hidden.to(torch.float32).square().mean(dim=-1).sqrt()
        return BranchScore(apply_forced(size, values), bound_of(x.branch, values))
