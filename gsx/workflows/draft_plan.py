"""The draft requested for an export: named, or searched on this machine. An impossible one is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gsx.workflows.draft_search import DraftSearch
from gsx_engines.bundle.drafts import DraftEntry, DraftKind, DraftVocabulary
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import Precision
from gsx_engines.draft_trials.measure import SHORTEST_CONTEXT, candidate_exits
from gsx_engines.speculation.spec import (
    check_draft,
    check_exit,
    check_layers,
    check_loops,
    parse_draft,
    refuse_other,
    refuse_rank,
    refuse_shared_cache,
)
from gsx_exporter.config import ModelConfig
from gsx_exporter.rules.plan import RulePlan
from gsx_exporter.rules.thresholds import grid_with
from gsx_plugins.errors import UsageError

# The exit, or the set of branches to leave out, with the largest speedup on this machine.
BEST_EXIT, BEST_LAYERS = "auto", "layers:auto"


@dataclass(frozen=True)
class DraftPlan:
    """The requested draft.

    Args:
        named: the draft; None if it is searched, or if there is no draft.
        search: `BEST_EXIT` or `BEST_LAYERS`; None if nothing is searched.
        exits: depths that the graphs may be split at; they are first split at the first one.
        vocabulary: how many tokens the exit chooses among; None for all.
    """

    named: DraftKind | None = None
    search: str | None = None
    exits: tuple[int, ...] = ()
    vocabulary: int | None = None

    @property
    def split(self) -> int | None:
        """The depth to split the graphs at; None for one graph."""
        return self.exits[0] if self.exits else None

    def settle(
        self, manifest: Manifest, vocabulary: DraftVocabulary | None, begin_search: Callable[[], DraftSearch]
    ) -> Manifest:
        """Check the draft or search for it. Returns: the manifest with it; its graphs are those of the best exit.

        Args: manifest: without a draft; vocabulary: what the exit chooses among; begin_search: called if a draft is
            searched.
        """
        if self.search is not None:
            search = begin_search()
            return search.best_exit(self.exits) if self.search == BEST_EXIT else search.best_layers()
        if self.named is None:
            return manifest
        manifest = manifest.model_copy(update={"draft": DraftEntry(draft=self.named, vocabulary=vocabulary)})
        check_draft(self.named, manifest)
        return manifest


def plan_draft(
    draft: str | None, vocabulary: int | None, config: ModelConfig, keep: RulePlan, precision: Precision
) -> DraftPlan:
    """Parse the arguments `draft` and `draft_vocabulary` of `gsx.export`, and check them against checkpoint and keep
    rule.

    Raises:
        UsageError: it is not a draft, or it does not work with the model, its keep rule or this machine; the vocabulary
            is not a part of the model's, or the draft has no head of its own.
    """
    plan = _plan_of(draft, config, keep, precision)
    if vocabulary is None:
        return plan
    if not plan.exits:
        raise UsageError(
            f"--draft-vocabulary {vocabulary}: only an exit has a head of its own",
            expected="--draft exit:E or auto",
            found="no draft" if draft is None else f"--draft {draft}",
        )
    least = max(1, len(config.eos_ids))
    if not least <= vocabulary <= config.vocab_size:
        raise UsageError(
            "the draft's vocabulary is out of range",
            expected=f"{least:,} (the tokens that end a text are always in it) to {config.vocab_size:,}"
            if config.eos_ids
            else f"{least} to {config.vocab_size:,}",
            found=f"{vocabulary:,}",
        )
    return replace(plan, vocabulary=vocabulary)


def _plan_of(draft: str | None, config: ModelConfig, keep: RulePlan, precision: Precision) -> DraftPlan:
    if draft is None:
        return DraftPlan()
    parsed = None if draft in (BEST_EXIT, BEST_LAYERS) else parse_draft(draft)
    if keep.by_rank:
        refuse_rank()
    if keep.of_model(config).shares_caches:
        refuse_shared_cache()
    if config.loops is not None and (parsed is None or parsed.kind != "loops"):
        raise UsageError(
            f"--draft {draft}: the model is looped, and its graph cannot be split or left out in parts",
            expected="loops:N, with fewer loops than the model",
            found=draft,
        )
    if parsed is None:
        _check_search(draft, config, keep, precision)
        exits = candidate_exits(config.exits, config.num_layers) if draft == BEST_EXIT else ()
        return DraftPlan(search=draft, exits=tuple(exits))
    if parsed.kind == "exit":
        check_exit(parsed.layer, config.num_layers)
        return DraftPlan(parsed, exits=(parsed.layer,))
    if parsed.kind == "loops":
        check_loops(parsed, config.loops if keep.branches else None)
    elif parsed.kind == "layers":
        if not keep.drafts_layers:
            refuse_other(parsed)
        check_layers(parsed, config.num_layers, keep.branches)
    elif keep.budget is None:
        refuse_other(parsed)
    elif parsed.budget < min(grid_with(keep.budget)):
        raise UsageError(
            f"the draft's budget is below the calibrated grid: {parsed}",
            expected=f"{min(grid_with(keep.budget)):g} to 1",
            found=f"{parsed.budget:g}",
        )
    return DraftPlan(parsed)


def _check_search(draft: str, config: ModelConfig, keep: RulePlan, precision: Precision) -> None:
    """Refuse a search that has nothing to measure."""
    if precision == "bf16":
        raise UsageError(
            f"--draft {draft} measures on ONNX Runtime, which computes bf16 in float32 on a CPU",
            expected="fp32 or fp16",
            found=precision,
            todo="name the draft: --draft exit:E or layers:SET",
        )
    if config.max_positions < SHORTEST_CONTEXT:
        raise UsageError(
            f"--draft {draft} needs room to generate",
            expected=f"a model with {SHORTEST_CONTEXT} positions or more",
            found=str(config.max_positions),
            todo="name the draft: --draft exit:E or layers:SET",
        )
    if draft == BEST_EXIT:
        return
    if not keep.drafts_layers:
        refuse_other(draft)
    if config.num_layers * len(keep.branches) < 2:
        raise UsageError(f"--draft {draft} needs at least two branches that may be skipped", found="one")
