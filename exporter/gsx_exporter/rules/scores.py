"""What traced rules with scores share: selection by a threshold for each branch, or by rank within the call.

Every sequence of a batch has thresholds of its own, so that requests of different budgets can share a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gsx_engines.bundle.words import BRANCHES, Branch, SelectionMode
from gsx_exporter.decoder.rule import FORCED, Tokens, Value, Values


def selection_inputs(selection: SelectionMode) -> Mapping[str, Value]:
    """The run-time inputs of a rule with scores."""
    if selection == "rank":
        return {"budget": Value(torch.float32, ())}
    return {"thresholds": Value(torch.float32, ("B", "L", 2))}


def call_values(selection: SelectionMode) -> Mapping[str, Value]:
    """What such a rule computes once per call: `bounds`, the threshold of every token at every branch; with selection
    by rank, `k`, the number of rows to keep."""
    if selection == "rank":
        return {**FORCED, "k": Value(torch.int64, (1,))}
    return {**FORCED, "bounds": Value(torch.float32, ("L", 2, "N"))}


def whole_inputs(selection: SelectionMode) -> frozenset[str]:
    """The inputs with an axis L that `enter` reads as a whole."""
    return frozenset() if selection == "rank" else frozenset(("thresholds",))


def by_token(tokens: Tokens, table: Tensor) -> Tensor:
    """A table by sequence, [B or 1, ...], for every token of a call: [..., N]. One row applies to all sequences; the
    exported default is such a row."""
    sequences, length = tokens.positions.shape
    rows = table.permute(*range(1, table.dim()), 0).unsqueeze(-1)
    return rows.expand(*rows.shape[:-2], sequences, length).reshape(*rows.shape[:-2], -1)


def bound_of(branch: Branch, values: Values) -> Tensor:
    """The threshold that each score must exceed, [N] float32; with selection by rank the number of rows, [1] int64."""
    return values["k"] if "k" in values else values["bounds"][BRANCHES.index(branch)]
