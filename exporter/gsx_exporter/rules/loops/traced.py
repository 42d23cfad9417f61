"""The number of loops of a looped model as a run-time input.

`loops [B]` says for each sequence how many loops its tokens run: a visit in loop p (from 0) runs where p < loops. The
first loop, and the layers before and after, always run. Facts: docs/methods.md section 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.decoder.rule import BranchInput, BranchScore, Tokens, TracedRule, Value, Values
from gsx_exporter.rules.scores import by_token

# Between the scores of a visit that runs, 1, and of one that does not, 0.
_BOUND = 0.5


@dataclass(frozen=True)
class LoopCount(TracedRule):
    """Keep a sequence's tokens in as many loops as it asks for."""

    shape: Loops

    @property
    def branches(self) -> tuple[Branch, ...]:
        return BRANCHES

    @property
    def layers(self) -> tuple[int, ...]:
        return self.shape.optional

    @property
    def inputs(self) -> Mapping[str, Value]:
        return {"loops": Value(torch.int64, ("B",))}

    @property
    def call(self) -> Mapping[str, Value]:
        return {"scores": Value(torch.float32, ("L", 2, "N"))}

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """All decisions at once, since every node costs time in a step; padding never runs."""
        needed = torch.tensor([self.shape.loop_of(visit) or 0 for visit in range(len(self.shape.visits))])
        runs = (needed < inputs["loops"].unsqueeze(1)).to(torch.float32)
        scores = by_token(tokens, runs.unsqueeze(2).expand(-1, -1, len(BRANCHES)))
        return {"scores": torch.where(tokens.valid, scores, -torch.tensor(float("inf")))}

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The token's score."""
        return BranchScore(values["scores"][BRANCHES.index(x.branch)], torch.tensor(_BOUND))
