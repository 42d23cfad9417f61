"""Drafts: cheap ways to guess the next tokens with the model's own weights; the whole model verifies every guess.

The loop (`gsx_engines/generation`) only knows the `Draft` interface; a separate draft head would implement it too.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues, at_budget
from gsx_engines.bundle.drafts import BudgetDraft, DraftKind, ExitDraft, LayersDraft, LoopsDraft
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.runners.base import Cache, Runner, StepOutput
from gsx_engines.runners.select import Backend, open_runner, open_split_runner
from gsx_engines.runners.split import SplitRunner, joined_output
from gsx_engines.speculation.spec import check_draft


class Draft(Protocol):
    """Guesses tokens, and has the whole model verify them."""

    runner: Runner
    kind: DraftKind

    def step(self, cache: Cache, ids: np.ndarray, controls: RuntimeValues, counts: list[int]) -> StepOutput:
        """Read one more token (or none) of each sequence.

        Args:
            cache: its lengths grow by `counts`.
            ids: [B, 1] int64.
            controls, counts: as in `Call`.
        Returns: logits [B, 1, V] of the guess; kept rows only if the model itself would have kept them as well.
        """
        ...

    def verify(
        self, cache: Cache, start: list[int], ids: np.ndarray, controls: RuntimeValues, counts: list[int]
    ) -> StepOutput:
        """Run the whole model on tokens, of which `step` has read all but the last of each sequence.

        Args:
            cache: holds the tokens afterwards.
            start: the cache's lengths before the tokens.
            ids: [B, S] int64.
            controls, counts: as in `Call`.
        Returns: logits [B, S, V].
        """
        ...


class EarlyExitDraft:
    """Drafts with the layers below an exit; verification runs the other layers on the states that the draft left."""

    def __init__(self, runner: SplitRunner) -> None:
        self.runner: Runner = runner
        self.kind: DraftKind = ExitDraft(layer=runner.exit_layer)
        self._split = runner

    def step(self, cache: Cache, ids: np.ndarray, controls: RuntimeValues, counts: list[int]) -> StepOutput:
        """See `Draft`."""
        return self._split.draft(cache, ids, controls, counts=counts)

    def verify(
        self, cache: Cache, start: list[int], ids: np.ndarray, controls: RuntimeValues, counts: list[int]
    ) -> StepOutput:
        """See `Draft`. The last token has to run through the early layers first."""
        last = np.array([[row[max(count - 1, 0)]] for row, count in zip(ids, counts, strict=True)])
        early = self._split.draft(cache, last, controls, counts=[min(count, 1) for count in counts], logits="none")
        return joined_output(early, self._split.verify(cache))


class FullDepthDraft:
    """Drafts with all layers but cheaper run-time values: fewer tokens pass the gates, or some branches do not run, or
    fewer loops.

    The K/V of drafted tokens are the draft's; verification computes them again.
    """

    def __init__(self, runner: Runner, kind: BudgetDraft | LayersDraft | LoopsDraft) -> None:
        self.runner = runner
        self.kind: DraftKind = kind
        self._changes = kind
        self._of: RuntimeValues = {}
        self._controls: RuntimeValues = {}

    def change(self, kind: BudgetDraft | LayersDraft | LoopsDraft) -> None:
        """Draft in another way from now on."""
        self.kind = self._changes = kind
        self._of = {}

    def step(self, cache: Cache, ids: np.ndarray, controls: RuntimeValues, counts: list[int]) -> StepOutput:
        """See `Draft`."""
        if controls is not self._of:  # the same object for a whole request, and a runner copies inputs that change
            self._of, self._controls = controls, draft_controls(self._changes, self.runner.manifest, controls)
        output = self.runner.step(cache, ids, self._controls, counts=counts)
        return StepOutput(output.scores, None)

    def verify(
        self, cache: Cache, start: list[int], ids: np.ndarray, controls: RuntimeValues, counts: list[int]
    ) -> StepOutput:
        """See `Draft`."""
        cache.roll_back(start)
        return self.runner.step(cache, ids, controls, counts=counts, logits="all")


def open_draft(
    bundle: Bundle,
    draft: DraftKind,
    threads: int | None = None,
    backend: Backend = "onnxruntime",
) -> Draft:
    """Open a draft of a bundle, with the runner that it needs.

    Args:
        threads: threads within an op; None for the runtime's own choice.
        backend: the runtime.
    Raises:
        UsageError: the bundle cannot draft in this way.
    """
    check_draft(draft, bundle.manifest)
    return draft_on(open_draft_runner(bundle, draft, threads, backend), draft)


def open_draft_runner(
    bundle: Bundle, draft: DraftKind | None, threads: int | None = None, backend: Backend = "onnxruntime"
) -> Runner:
    """Open the runner that a draft needs, which can also decode plainly; without a draft, the fastest runner."""
    if isinstance(draft, ExitDraft):
        return open_split_runner(bundle, threads, backend)
    return open_runner(bundle, threads, backend)


def draft_on(runner: Runner, draft: DraftKind) -> Draft:
    """The draft on a runner that `open_draft_runner` opened for it."""
    if isinstance(draft, ExitDraft):
        assert isinstance(runner, SplitRunner)
        return EarlyExitDraft(runner)
    return FullDepthDraft(runner, draft)


def draft_controls(
    draft: BudgetDraft | LayersDraft | LoopsDraft, manifest: Manifest, controls: RuntimeValues
) -> RuntimeValues:
    """The run-time values of a draft: those of the request, except the one that the draft changes.

    A branch that is left out has 0 in the layer mask, or plus infinity as its threshold.
    """
    if isinstance(draft, BudgetDraft):
        assert manifest.selection is not None
        return at_budget(controls, manifest.selection, draft.budget)
    if isinstance(draft, LoopsDraft):  # of a request that asks for fewer, its own number
        return {**controls, "loops": np.minimum(controls["loops"], draft.loops)}
    name, out = ("layer_mask", 0.0) if "layer_mask" in controls else ("thresholds", np.inf)
    changed = controls[name].copy()
    for layer, branch in draft.skip:
        changed[..., layer, BRANCHES.index(branch)] = out
    return {**controls, name: changed}
