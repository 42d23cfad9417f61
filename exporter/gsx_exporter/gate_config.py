"""The gates of a checkpoint, as `config.json` describes them (docs/design.md, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.errors import CheckpointError
from gsx_exporter.section import known_keys, one_of

GateKind = Literal["vector", "scalar"]
GateInput = Literal["post_norm", "pre_norm"]
GateScore = Literal["mean", "logit", "linear"]


@dataclass(frozen=True)
class GateConfig:
    """The gates of a checkpoint: `config.json`, section `"gsx"`, key `"gate"`.

    Args:
        kind: `vector` (W [H, H]) or `scalar` (W [1, H]).
        input: what the gate reads: the branch's normalized input (`post_norm`) or the residual stream (`pre_norm`).
        branches: which branches of every layer have a gate.
        score: what is compared with a threshold: the `mean` of the gate's values, or of a scalar gate the `logit`
            before the sigmoid. The ranks are the same, but a gate that is nearly open for all tokens has no room in
            float32 between values just below 1. Of a vector gate `linear`: a linear function of what the gate reads,
            fitted to the logit of the mean (`training/linear_scores.py`), so that a token that is skipped needs no
            product with W.
        skip_weights: for every layer, how much of the skipping the gate of each branch takes (`gate_shares.py`); None
            for all the same.
    """

    kind: GateKind = "vector"
    input: GateInput = "post_norm"
    branches: tuple[Branch, ...] = BRANCHES
    score: GateScore = "mean"
    skip_weights: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        one_of("gsx.gate.kind", self.kind, ("vector", "scalar"))
        one_of("gsx.gate.input", self.input, ("post_norm", "pre_norm"))
        one_of("gsx.gate.score", self.score, ("mean", "logit", "linear"))
        if self.score == "logit" and self.kind != "scalar":
            raise CheckpointError(
                "config.json: gsx.gate.score is logit, and a vector gate has many",
                expected='"mean", or the kind scalar',
                found=f"kind {self.kind}",
            )
        if self.score == "linear" and self.kind != "vector":
            raise CheckpointError(
                "config.json: gsx.gate.score is linear, and a scalar gate is linear itself",
                expected='"logit" or "mean", or the kind vector',
                found=f"kind {self.kind}",
            )
        for branch in self.branches:
            one_of("gsx.gate.branches", branch, BRANCHES)
        if not self.branches or len(set(self.branches)) != len(self.branches):
            raise CheckpointError(
                "config.json: gsx.gate.branches is not a list of distinct branches",
                expected='one or both of "attn", "mlp"',
                found=repr(list(self.branches)),
            )
        if self.skip_weights is not None and not _are_weights(self.skip_weights, len(self.branches)):
            raise CheckpointError(
                "config.json: gsx.gate.skip_weights does not say how much of the skipping each gate takes",
                expected=f"for every layer {len(self.branches)} numbers of at least 0, one of them above 0",
                found=repr(self.skip_weights)[:80],
            )

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], layers: int | None = None) -> GateConfig:
        """Read the section.

        Args: layers: of the model; None if that is not known.

        Raises:
            CheckpointError: an unknown key, or a value that is not allowed.
        """
        known_keys("gsx.gate", section, ("kind", "input", "branches", "score", "skip_weights"))
        values = dict(section)
        if "branches" in values:
            listed = values["branches"]
            values["branches"] = tuple(listed) if isinstance(listed, list | tuple) else (listed,)
        if isinstance(weights := values.get("skip_weights"), list):
            values["skip_weights"] = tuple(tuple(row) if isinstance(row, list) else row for row in weights)
        found = cls(**values)
        if layers is not None and found.skip_weights is not None and len(found.skip_weights) != layers:
            raise CheckpointError(
                "config.json: gsx.gate.skip_weights is of another model",
                expected=f"{layers} layers",
                found=str(len(found.skip_weights)),
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The section as `config.json` stores it."""
        found: dict[str, Any] = {"kind": self.kind, "input": self.input, "branches": list(self.branches)}
        if self.score != "mean":
            found["score"] = self.score
        if self.skip_weights is not None:
            found["skip_weights"] = [list(row) for row in self.skip_weights]
        return found


def _are_weights(rows: tuple[tuple[float, ...], ...], branches: int) -> bool:
    if not isinstance(rows, tuple) or any(not isinstance(row, tuple) or len(row) != branches for row in rows):
        return False
    each = [weight for row in rows for weight in row]
    return all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0
        for weight in each
    ) and any(each)
