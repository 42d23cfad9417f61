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

from gsx_exporter.config import BRANCHES, Branch
from gsx_exporter.rules.base import KeepRule, Tokens, Value, Values, Verdict, before

if TYPE_CHECKING:
    from gsx_exporter.decoder.layer import DecoderLayer

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
    # The scores of all layers are made at once: single steps pay for every node.
    whole = frozenset(("layer_mask",))
    call = {"scores": Value(torch.float32, ("L", 2, "N"))}  # noqa: RUF012

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """The mask's entries are the scores; tokens below `full_until` run in full, padding never."""
        sequences, length = tokens.positions.shape
        mask = inputs["layer_mask"].permute(1, 2, 0).unsqueeze(3)
        # A mask of one sequence serves all: the exported default has one.
        scores = mask.expand(mask.shape[0], mask.shape[1], sequences, length).reshape(mask.shape[0], mask.shape[1], -1)
        infinity = torch.tensor(float("inf"))
        scores = torch.where(before(tokens.positions, inputs["full_until"]), infinity, scores)
        return {"scores": torch.where(tokens.valid, scores, -infinity)}

    def judge(self, layer: DecoderLayer, branch: Branch, hidden: Tensor, normed: Tensor, values: Values) -> Verdict:
        """The token's score."""
        return Verdict(values["scores"][BRANCHES.index(branch)], torch.tensor(_BOUND))
