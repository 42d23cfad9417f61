"""The section `draft` of `gsx.json`: what is left out to draft, and what was measured of it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from typing import Annotated, Literal

from pydantic import Field

from gsx_engines.bundle.fields import BRANCHES, Branch, Budget, Section


class ExitDraft(Section):
    """Draft with the first `layer` layers, final norm and head; the graphs `draft` and `verify` are split there."""

    kind: Literal["exit"] = "exit"
    layer: int

    def __str__(self) -> str:
        return f"exit:{self.layer}"


class BudgetDraft(Section):
    """Draft with the whole depth at a lower budget."""

    kind: Literal["budget"] = "budget"
    budget: Budget

    def __str__(self) -> str:
        return f"budget:{self.budget:g}"


class LayersDraft(Section):
    """Draft without some gated branches (layer, branch)."""

    kind: Literal["layers"] = "layers"
    skip: tuple[tuple[int, Branch], ...]

    def __str__(self) -> str:
        return "layers:" + places_text(self.skip)


def places_text(places: Collection[tuple[int, Branch]]) -> str:
    """A set of branches as `layer_sets.parse_places` reads it: neighbours that name the same are a range."""
    named = {layer: tuple(b for b in BRANCHES if (layer, b) in places) for layer, _ in sorted(places)}
    parts = []
    # In a range, layer less place is the same.
    for (branches, _), group in groupby(enumerate(named), lambda at: (named[at[1]], at[1] - at[0])):
        layers = [layer for _, layer in group]
        ends = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(ends if branches == BRANCHES else f"{ends}.{branches[0]}")
    return ",".join(parts)


DraftKind = Annotated[ExitDraft | BudgetDraft | LayersDraft, Field(discriminator="kind")]


DraftTokens = Annotated[int, Field(ge=1)]


class DraftMeasurement(Section):
    """What one draft gave when it was tried (`--draft auto`, `--draft layers:auto`).

    Args:
        draft: what was left out.
        length: tokens drafted before a verification: the best one found.
        acceptance: share of drafted tokens that were right, those behind a wrong one not counted.
        tokens_per_second, plain_tokens_per_second: with this draft and without one, taking turns.
    """

    draft: DraftKind
    length: DraftTokens
    acceptance: float
    tokens_per_second: float
    plain_tokens_per_second: float


class DraftEntry(Section):
    """How this bundle drafts, unless another way is asked for.

    Args:
        draft: what is left out.
        length: tokens drafted before the first verifications, until the loop knows better; null: its own choice.
        measured: where the draft was chosen by measuring (`auto`, `layers:auto`), what was seen of each candidate.
    """

    draft: DraftKind
    length: DraftTokens | None = None
    measured: tuple[DraftMeasurement, ...] = ()
