"""GateSkip (arXiv:2510.13876): a trained gate at each branch scores the token and multiplies the branch's output.

Semantics: docs/design.md section 3; facts: docs/methods.md section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gsx_engines.bundle.words import Branch, SelectionMode
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.rule import (
    BranchInput,
    BranchScore,
    DividesBudget,
    Tokens,
    TracedRule,
    Value,
    Values,
    apply_forced,
    forced,
)
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.rules.scores import bound_of, by_token, call_values, selection_inputs, whole_inputs


@dataclass(frozen=True)
class GateSkip(TracedRule, DividesBudget):
    """Keep tokens by the checkpoint's gates: those above a threshold, or the best K of the call.

    Args:
        gate: the checkpoint's gates.
        eos_ids: end-of-text tokens, which are always kept.
        selection: by `threshold` (run-time input `thresholds [B, L, 2]`) or by `rank` (`budget []`).
    """

    gate: GateConfig
    eos_ids: tuple[int, ...]
    selection: SelectionMode = "threshold"

    @classmethod
    def of(cls, config: ModelConfig, selection: SelectionMode = "threshold") -> GateSkip:
        """The rule of a gated checkpoint."""
        assert config.gate is not None, "the checkpoint has gates"
        return cls(config.gate, config.eos_ids, selection)

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.gate.branches

    def skip_weight(self, layer: int, branch: Branch) -> float:
        """See `GateConfig`."""
        weights = self.gate.skip_weights
        return 1.0 if weights is None else weights[layer][self.gate.branches.index(branch)]

    @property
    def by_rank(self) -> bool:
        return self.selection == "rank"

    @property
    def inputs(self) -> Mapping[str, Value]:
        return selection_inputs(self.selection)

    @property
    def whole(self) -> frozenset[str]:
        return whole_inputs(self.selection)

    @property
    def call(self) -> Mapping[str, Value]:
        return call_values(self.selection)

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """End-of-text is always kept; with selection by rank, K depends on the number of valid tokens in the call."""
        ends = self._end_of_text(tokens.ids)
        values = dict(forced(tokens, ends))
        if self.by_rank:
            values["k"] = rank_count(tokens.valid, ends, inputs["budget"])
        else:
            values["bounds"] = by_token(tokens, inputs["thresholds"])
        return values

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The score is the gate's (`GateConfig.score`); the gate multiplies the branch's output."""
        gate, score = x.gate()
        return BranchScore(apply_forced(score, values), bound_of(x.branch, values), gate)

    def _end_of_text(self, ids: Tensor) -> Tensor:
        found = torch.zeros_like(ids, dtype=torch.bool)
        for eos in self.eos_ids:
            found = found | (ids == eos)
        return found


def rank_count(valid: Tensor, ends: Tensor, budget: Tensor) -> Tensor:
    """Number of rows that selection by rank keeps in this call: [1] int64.

    The formula of docs/design.md, section 3, in whole millionths: with the budget as a float32, the count would
    sometimes be off by one (docs/methods.md, 3.4). End-of-text tokens are added on top.

    Args: valid [N] bool, false for padding; ends [N] bool, end-of-text; budget [] float32.
    """
    n = (valid & ~ends).sum()
    on_top = (valid & ends).sum()
    skip_millionths = 1_000_000 - torch.round(budget * 1e6).to(torch.int64).clamp(max=1_000_000)
    others = (n - 1).clamp(min=0)
    # As an operator: torch.div with a rounding mode becomes a float32 division in ONNX, one off for some n.
    skipped = (skip_millionths * others) // 1_000_000
    ranked = n - torch.where((skip_millionths > 0) & (n > 1), skipped + 1, torch.zeros_like(n))
    return (ranked + on_top).reshape(1)
