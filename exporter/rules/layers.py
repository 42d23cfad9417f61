"""Sets of layers as a run-time input: per-sequence layer sets (arXiv:2410.20022), exits (Sorted LLaMA,
arXiv:2309.08968), Unified Layer Skipping (arXiv:2404.06954).

`layer_mask [B, L, 2]` says which branches run for a sequence; a token below `full_until` runs all of them, which is how
Unified Layer Skipping runs its prompt. An exit after E layers is the set of the layers below E. Facts: docs/methods.md
sections 6 to 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporter.config import BRANCHES, Branch
from exporter.rules.base import FORCED, KeepRule, Tokens, Value, Values, Verdict, apply_forced, before, forced

if TYPE_CHECKING:
    from exporter.decoder.layer import DecoderLayer

# Between a mask's 0 and 1.
_BOUND = 0.5


class Layers(KeepRule):
    """Keep what the request's set of layers names."""

    name = "layers"
    branches = BRANCHES
    inputs = {  # noqa: RUF012 - the rule has no parameters
        "layer_mask": Value(torch.float32, ("B", "L", 2)),
        "full_until": Value(torch.int64, ("B",)),
    }
    call = FORCED

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Tokens below `full_until` run in full."""
        return forced(tokens, before(tokens.positions, inputs["full_until"]))

    def judge(self, layer: DecoderLayer, branch: Branch, hidden: Tensor, normed: Tensor, values: Values) -> Verdict:
        """The mask's entry for the token's sequence is the score."""
        mask = values["layer_mask"][:, BRANCHES.index(branch)]
        # A mask of one sequence serves all: the exported default has one.
        sequences = values["forced"].view(mask.shape[0], -1)
        score = mask.unsqueeze(1).expand_as(sequences).reshape(-1)
        return Verdict(apply_forced(score, values), torch.tensor(_BOUND))
