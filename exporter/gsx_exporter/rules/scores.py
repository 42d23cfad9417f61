"""What traced rules with scores share: selection by a threshold for each branch, or by rank within the call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gsx_engines.bundle.words import BRANCHES, Branch, SelectionMode
from gsx_exporter.decoder.rule import FORCED, Value, Values


def selection_inputs(selection: SelectionMode) -> Mapping[str, Value]:
    """The run-time inputs of a rule with scores."""
    if selection == "rank":
        return {"budget": Value(torch.float32, ())}
    return {"thresholds": Value(torch.float32, ("L", 2))}


def call_values(selection: SelectionMode) -> Mapping[str, Value]:
    """What such a rule computes once per call; with selection by rank, `k` is the number of rows to keep."""
    return {**FORCED, "k": Value(torch.int64, (1,))} if selection == "rank" else FORCED


def bound_of(branch: Branch, values: Values) -> Tensor:
    """The threshold that a score must exceed, [] float32; with selection by rank the number of rows, [1] int64."""
    return values["k"] if "k" in values else values["thresholds"][BRANCHES.index(branch)]
