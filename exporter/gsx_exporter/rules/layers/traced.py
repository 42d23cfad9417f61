"""Sets of layers as a run-time input: per-sequence layer sets (arXiv:2410.20022), exits (Sorted LLaMA,
arXiv:2309.08968), Unified Layer Skipping (arXiv:2404.06954).

`layer_mask [B, L, 2]` says which branches run for a sequence. A token at a position below `full_until` runs all of
them; Unified Layer Skipping runs its prompt this way. An exit after E layers is the set of the layers below E. Facts:
docs/methods.md sections 6 to 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.decoder.rule import BranchInput, BranchScore, Tokens, TracedRule, Value, Values, before
from gsx_exporter.rules.scores import by_token

# Between a mask's 0 and 1.
_BOUND = 0.5


@dataclass(frozen=True)
class Layers(TracedRule):
    """Keep a sequence's tokens in the layers of its set."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        return BRANCHES

    @property
    def inputs(self) -> Mapping[str, Value]:
        return {"layer_mask": Value(torch.float32, ("B", "L", 2)), "full_until": Value(torch.int64, ("B",))}

    @property
    def whole(self) -> frozenset[str]:
        """See `TracedRule`: the scores of all layers are computed at once, since every node costs time in a step."""
        return frozenset(("layer_mask",))

    @property
    def call(self) -> Mapping[str, Value]:
        return {"scores": Value(torch.float32, ("L", 2, "N"))}

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """The mask's entries are the scores; tokens below `full_until` always run, padding never."""
        infinity = torch.tensor(float("inf"))
        full = before(tokens.positions, inputs["full_until"])
        scores = torch.where(full, infinity, by_token(tokens, inputs["layer_mask"]))
        return {"scores": torch.where(tokens.valid, scores, -infinity)}

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The token's score."""
        return BranchScore(values["scores"][BRANCHES.index(x.branch)], torch.tensor(_BOUND))
