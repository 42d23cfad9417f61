"""The textual form of a draft (`exit:2`, `budget:0.5`, `layers:3.attn,5-7`, `loops:1`), and whether a bundle supports
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from gsx_engines.bundle.drafts import BudgetDraft, DraftKind, ExitDraft, LayersDraft, LoopsDraft
from gsx_engines.bundle.layer_sets import parse_places
from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.selection import check_budget
from gsx_engines.bundle.words import Branch
from gsx_plugins.errors import UsageError

_EXPECTED = "exit:E (layers), budget:B (a share), layers:SET (e.g. 3.attn,5-7), or loops:N"


def parse_draft(text: str) -> DraftKind:
    """Parse a draft.

    `exit:E` drafts with the first E layers; `budget:B` with all layers at a lower budget; `layers:SET` without some
    branches: `5` for both branches of layer 5 (counted from 0), `5.mlp` for one of them, `5-7` for a range;
    `loops:N` with fewer loops of a looped model.

    Raises:
        UsageError: the text has none of these forms.
    """
    kind, colon, value = text.partition(":")
    if not colon or kind not in ("exit", "budget", "layers", "loops"):
        _refuse(text)
    try:
        if kind == "exit":
            return ExitDraft(layer=int(value))
        if kind == "loops":
            return LoopsDraft(loops=int(value))
        if kind == "layers":
            return LayersDraft(skip=parse_places(value))
        budget = float(value)
    except ValueError:
        _refuse(text)
    check_budget(budget)
    return BudgetDraft(budget=budget)


def check_draft(draft: DraftKind, manifest: Manifest) -> None:
    """Refuse a draft that a bundle does not support.

    Raises:
        UsageError: selection by rank, an exit other than the bundle's, a budget outside its grid, unknown branches.
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
    elif isinstance(draft, LoopsDraft):
        reads = manifest.policy is not None and manifest.policy.input("loops") is not None
        check_loops(draft, manifest.decoder.loops if reads else None)
    else:
        check_layers(draft, manifest.decoder.num_layers, check_leaves_out(draft, manifest))


def check_leaves_out(draft: DraftKind | str, manifest: Manifest) -> tuple[Branch, ...]:
    """Refuse a bundle whose rule cannot leave out given branches. Returns: the branches that it can leave out."""
    policy = manifest.policy
    if policy is None or not (policy.skips_any_branch or policy.input("layer_mask")):
        refuse_other(draft)
    return policy.branches


def check_layers(draft: LayersDraft, layers: int, branches: Sequence[Branch]) -> None:
    """Refuse branches that the model does not have, and a draft that leaves out all of them."""
    gated = {(layer, branch) for layer in range(layers) for branch in branches}
    unknown = sorted(set(draft.skip) - gated)
    if unknown or not gated - set(draft.skip):
        raise UsageError(
            f"the draft {draft} leaves out branches that it cannot",
            expected=f"some, but not all, of the skippable branches of layers 0 to {layers - 1}: "
            + ", ".join(branches),
            found=", ".join(f"{layer}.{branch}" for layer, branch in unknown) or "all of them",
        )


def check_loops(draft: LoopsDraft, loops: Loops | None) -> None:
    """Refuse a draft with fewer loops where nothing says how many run, or with as many as the model has.

    Args: loops: of a model whose keep rule reads their number; None for any other.
    """
    if loops is None:
        raise UsageError(
            f"the draft {draft} needs a keep rule that reads the number of loops",
            expected="a looped model, exported with --policy loops",
            found="a model without",
        )
    if draft.loops >= loops.most:
        raise UsageError(
            f"the draft {draft} is not one with fewer loops than the model",
            expected=f"1 to {loops.most - 1}" if loops.most > 1 else "a model with several loops",
            found=str(draft.loops),
        )


def check_speculation(manifest: Manifest) -> None:
    """Refuse a bundle that cannot speculate at all."""
    if manifest.selection is not None and manifest.selection.mode == "rank":
        refuse_rank()
    if manifest.depends_on_call:
        refuse_shared_cache()


def refuse_rank() -> NoReturn:
    """Refuse rank selection: drafted tokens are verified in one call, where they would compete with each other."""
    raise UsageError(
        "speculation needs selection by threshold",
        found="rank: whether a token is kept depends on the other tokens of the call, including drafted ones",
        todo="export with --select threshold, or decode plainly (no --draft; --no-speculative)",
    )


def refuse_shared_cache() -> NoReturn:
    """Refuse a looped model with one cache for all loops: a verification in one call would not be the model's text."""
    raise UsageError(
        "speculation needs a model whose loops have caches of their own",
        expected="recurrent_kv_cache_mode per_loop",
        found="last_loop: in all loops but the last, what tokens see of each other depends on which are in one call",
        todo="decode plainly (no --draft; --no-speculative)",
    )


def refuse_other(draft: DraftKind | str) -> NoReturn:
    """Refuse a draft for a model whose keep rule has nothing that such a draft could change."""
    budget = isinstance(draft, BudgetDraft)
    needs = "thresholds" if budget else "gates, or --policy layers"
    raise UsageError(
        f"the draft {draft} needs {needs}, and this model has none",
        expected="exit:E" if budget else f"exit:E, or --policy layers with {draft}",
        todo="export with --draft exit:E" + ("" if budget else f", or with --policy layers --draft {draft}"),
    )


def check_exit(layer: int, layers: int) -> None:
    """Refuse an exit without a layer below it, or without one above it."""
    if not 0 < layer < layers:
        raise UsageError(
            f"the exit is not between two of the model's {layers} layers",
            expected=f"1 to {layers - 1}",
            found=str(layer),
        )


def _refuse(text: str) -> NoReturn:
    raise UsageError(f"{text!r} is not a draft", expected=_EXPECTED, found=repr(text)) from None
