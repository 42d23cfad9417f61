"""FFN-SkipLLM (arXiv:2404.03865): a token whose state an FFN hardly changes skips the next FFNs. Needs no training.

Attention always runs. After each FFN that a token ran, its residual stream is compared with the one before it. If the
change, 1 - cosine, is at most the layer's threshold, the FFNs of the next `stride` layers are skipped; the one after
them runs, and its change is measured again. A layer with the threshold minus infinity is cold: its FFN always runs, and
never causes a skip. Facts, and what is unknown: docs/methods.md section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.decoder.rule import (
    FORCED,
    BranchInput,
    BranchScore,
    Tokens,
    TracedRule,
    Value,
    Values,
    WatchesBranches,
    apply_forced,
    before,
    forced,
)

_MLP = BRANCHES.index("mlp")


@dataclass(frozen=True)
class FfnSkip(TracedRule, WatchesBranches):
    """Skip the FFNs after one that hardly changed the state.

    Args:
        stride: number of FFNs that are then skipped.
    """

    stride: int

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("mlp",)

    @property
    def inputs(self) -> Mapping[str, Value]:
        return {"thresholds": Value(torch.float32, ("L", 2)), "full_until": Value(torch.int64, ("B",))}

    @property
    def call(self) -> Mapping[str, Value]:
        return FORCED

    @property
    def carried(self) -> Mapping[str, Value]:
        """See `TracedRule`. verdict: the change of the last FFN that ran, minus its threshold (above 0, the next FFN
        runs); left: for how many more layers that applies."""
        return {"verdict": Value(torch.float32, ("N", 1)), "left": Value(torch.float32, ("N", 1))}

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Tokens below `full_until` run in full; no FFN has run yet."""
        values = dict(forced(tokens, before(tokens.positions, inputs["full_until"])))
        nothing = torch.zeros_like(values["forced_score"]).unsqueeze(1)
        return {**values, "verdict": nothing, "left": nothing.clone()}

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The score is the verdict where one applies, else infinity."""
        warm = values["thresholds"][_MLP] > -torch.inf
        holds = (values["left"] > 0) & warm
        score = torch.where(holds, values["verdict"], torch.tensor(torch.inf))
        return BranchScore(apply_forced(score.squeeze(1), values), torch.tensor(0.0))

    def after(self, branch: Branch, before: Tensor, after: Tensor, index: Tensor, values: Values) -> Values:
        """Rows that ran get a new verdict; for the others the old one applies to one layer fewer."""
        was, now = (state.index_select(0, index).to(torch.float32) for state in (before, after))
        found = 1 - _dot(was, now) / (_dot(was, was) * _dot(now, now)).sqrt() - values["thresholds"][_MLP]
        left = torch.where(found > 0, 1.0, float(self.stride))
        return {
            "verdict": values["verdict"].index_copy(0, index, found),
            "left": (values["left"] - 1).index_copy(0, index, left),
        }


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Dot products of rows, [K, H] twice -> [K, 1]: a matrix product, since ONNX Runtime's sum gives a wrong shape for
    K = 0."""
    return torch.bmm(one.unsqueeze(1), other.unsqueeze(2)).squeeze(2)
