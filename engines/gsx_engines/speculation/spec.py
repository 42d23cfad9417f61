"""What a draft is, as people write it: `exit:2`, `budget:0.5`, `layers:3.attn,5-7`; and whether a bundle has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from gsx_engines.bundle.drafts import BudgetDraft, DraftKind, ExitDraft, LayersDraft
from gsx_engines.bundle.fields import Branch
from gsx_engines.bundle.layer_sets import parse_places
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.selection import check_budget
from gsx_plugins.errors import UsageError

_EXPECTED = "exit:E (layers), budget:B (a share), or layers:SET (e.g. 3.attn,5-7)"


def parse_draft(text: str) -> DraftKind:
    """Read a draft.

    `exit:E` drafts with the first E layers; `budget:B` with the whole depth at a lower budget; `layers:SET` without
    some branches: `5` for both branches of layer 5 (counted from 0), `5.mlp` for one, `5-7` for a range.

    Raises:
        UsageError: it is none of these.
    """
    kind, colon, value = text.partition(":")
    if not colon or kind not in ("exit", "budget", "layers"):
        _refuse(text)
    try:
        if kind == "exit":
            return ExitDraft(layer=int(value))
        if kind == "layers":
            return LayersDraft(skip=parse_places(value))
        budget = float(value)
    except ValueError:
        _refuse(text)
    check_budget(budget)
    return BudgetDraft(budget=budget)


def check_draft(draft: DraftKind, manifest: Manifest) -> None:
    """Refuse a draft that a bundle does not have.

    Raises:
        UsageError: selection by rank, another split than the bundle's, a budget outside its grid, unknown branches.
    """
    check_speculation(manifest)
    if isinstance(draft, ExitDraft):
        check_exit(draft.layer, manifest.decoder.num_layers)
        own = manifest.draft.draft if manifest.draft is not None else None
        if own != draft:
            raise UsageError(
                f"this bundle cannot draft with {draft}",
                expected="its own: " + str(own) if isinstance(own, ExitDraft) else "graphs that are split at an exit",
                found="none" if own is None else str(own),
                todo=f"export again with --draft {draft}",
            )
    elif isinstance(draft, BudgetDraft):
        if manifest.selection is None:
            refuse_other(draft)
        manifest.selection.thresholds_for(draft.budget)
    else:
        check_layers(draft, manifest.decoder.num_layers, check_leaves_out(draft, manifest))


def check_leaves_out(draft: DraftKind | str, manifest: Manifest) -> tuple[Branch, ...]:
    """Refuse a bundle whose rule cannot leave out any branch that it is told to. Returns: the branches that it can."""
    policy = manifest.policy
    if policy is None or not (policy.name == "gateskip" or policy.input("layer_mask")):
        refuse_other(draft)
    return policy.branches


def check_layers(draft: LayersDraft, layers: int, branches: Sequence[Branch]) -> None:
    """Refuse branches that a model does not have, and all of them."""
    gated = {(layer, branch) for layer in range(layers) for branch in branches}
    unknown = sorted(set(draft.skip) - gated)
    if unknown or not gated - set(draft.skip):
        raise UsageError(
            f"{draft} cannot be left out",
            expected=f"some, not all, of the skippable branches of layers 0 to {layers - 1}: " + ", ".join(branches),
            found=", ".join(f"{layer}.{branch}" for layer, branch in unknown) or "all of them",
        )


def check_speculation(manifest: Manifest) -> None:
    """Refuse a bundle that cannot speculate at all."""
    if manifest.selection is not None and manifest.selection.mode == "rank":
        refuse_rank()


def refuse_rank() -> NoReturn:
    """Speculation reads drafted tokens in one call; by rank they would decide about each other."""
    raise UsageError(
        "speculation needs selection by threshold",
        found="rank: whether a token is kept depends on the other tokens of the call, drafted ones among them",
        todo="export with --select threshold, or decode plainly (no --draft; --no-speculative)",
    )


def refuse_other(draft: DraftKind | str) -> NoReturn:
    """A model whose keep rule has nothing that such a draft could change."""
    needs = "thresholds" if isinstance(draft, BudgetDraft) else "gates, or --policy layers"
    raise UsageError(
        f"the draft {draft} needs {needs}, and this model has none",
        expected="exit:E",
        todo="export with --draft exit:E",
    )


def check_exit(layer: int, layers: int) -> None:
    """Refuse an exit that leaves no layer below it or none above it."""
    if not 0 < layer < layers:
        raise UsageError(
            f"the exit layer is not inside the model's {layers}", expected=f"1 to {layers - 1}", found=str(layer)
        )


def _refuse(text: str) -> NoReturn:
    raise UsageError(f"{text!r} is not a draft", expected=_EXPECTED, found=repr(text)) from None
