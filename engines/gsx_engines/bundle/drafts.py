"""The section `draft` of `gsx.json`: what a draft leaves out, and what was measured."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gsx_engines.bundle.fields import Budget, Section, Share, SparseSection
from gsx_engines.bundle.selection import CalibrationText
from gsx_engines.bundle.words import BRANCHES, Branch


class ExitDraft(Section):
    """Draft with the first `layer` layers, the final norm and the head; the graphs `draft` and `verify` split there."""

    kind: Literal["exit"] = "exit"
    layer: int

    def __str__(self) -> str:
        return f"exit:{self.layer}"


class BudgetDraft(Section):
    """Draft with all layers at a lower budget."""

    kind: Literal["budget"] = "budget"
    budget: Budget

    def __str__(self) -> str:
        return f"budget:{self.budget:g}"


class LayersDraft(Section):
    """Draft without some of the skippable branches (layer, branch)."""

    kind: Literal["layers"] = "layers"
    skip: tuple[tuple[int, Branch], ...]

    def __str__(self) -> str:
        return "layers:" + places_text(self.skip)


class LoopsDraft(Section):
    """Draft with fewer loops of a looped model."""

    kind: Literal["loops"] = "loops"
    loops: Annotated[int, Field(ge=1)]

    def __str__(self) -> str:
        return f"loops:{self.loops}"


def places_text(places: Collection[tuple[int, Branch]]) -> str:
    """A set of branches in the form that `layer_sets.parse_places` reads; neighbouring layers with the same branches
    become a range."""
    named = {layer: tuple(b for b in BRANCHES if (layer, b) in places) for layer, _ in sorted(places)}
    parts = []
    # Within a range, the difference of layer and index is constant.
    for (branches, _), group in groupby(enumerate(named), lambda at: (named[at[1]], at[1] - at[0])):
        layers = [layer for _, layer in group]
        ends = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(ends if branches == BRANCHES else f"{ends}.{branches[0]}")
    return ",".join(parts)


DraftKind = Annotated[ExitDraft | BudgetDraft | LayersDraft | LoopsDraft, Field(discriminator="kind")]


DraftTokens = Annotated[int, Field(ge=1)]


class DraftMeasurement(Section):
    """The measurement of one draft (`--draft auto`, `--draft layers:auto`).

    Args:
        draft: what was left out.
        length: the best number found of tokens to draft before a verification.
        acceptance: share of drafted tokens that were correct; those after a wrong one are not counted.
        tokens_per_second, plain_tokens_per_second: with this draft and without one, measured in alternation.
    """

    draft: DraftKind
    length: DraftTokens
    acceptance: float
    tokens_per_second: float
    plain_tokens_per_second: float


class DraftVocabulary(Section):
    """The tokens that an exit's draft chooses among: those that a text has most often, and those that end a text.

    Args:
        tokens: how many.
        covered: the share of the text's tokens that are among them.
        text: the text that was counted.
    """

    tokens: Annotated[int, Field(ge=1)]
    covered: Share
    text: CalibrationText


class DraftEntry(SparseSection):
    """How this bundle drafts, unless a request chooses another draft.

    Args:
        draft: what is left out.
        length: tokens to draft before the first verifications, until the loop has measurements; null: its own choice.
        measured: if the draft was chosen by measurement (`auto`, `layers:auto`), the result of each candidate.
        vocabulary: the tokens that an exit's draft chooses among; null: all, and the manifest does not have the key.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"vocabulary"})

    draft: DraftKind
    length: DraftTokens | None = None
    measured: tuple[DraftMeasurement, ...] = ()
    vocabulary: DraftVocabulary | None = None
