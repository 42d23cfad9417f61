"""Drafts: cheap ways to guess the next tokens with the model's own weights, each verified by the whole model.

The loop (`gsx_engines/generation.py`) knows the `Draft` interface alone; a separate draft head would be another one.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import Controls, selected
from gsx_engines.bundle.drafts import BudgetDraft, DraftKind, ExitDraft, LayersDraft
from gsx_engines.bundle.fields import BRANCHES
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.runners.base import Cache, Runner, StepOutput
from gsx_engines.runners.select import Backend, open_runner, open_split_runner
from gsx_engines.runners.split import SplitRunner, joined_output
from gsx_engines.speculation.spec import check_draft


class Draft(Protocol):
    """Guesses tokens, and lets the whole model look at them."""

    runner: Runner
    kind: DraftKind

    def step(self, cache: Cache, ids: np.ndarray, controls: Controls, counts: list[int]) -> StepOutput:
        """Read one more token (or none) of each sequence.

        Args: ids [B, 1]; controls, counts as in `Call`.
        Returns: logits [B, 1, V] of the guess; kept rows where the model itself would have kept them.
        """
        ...

    def verify(
        self, cache: Cache, start: list[int], ids: np.ndarray, controls: Controls, counts: list[int]
    ) -> StepOutput:
        """Run the whole model on tokens, of which `step` has read all but each sequence's last.

        Args: start: the cache's lengths before them; ids [B, S]; counts: of each sequence.
        Returns: logits [B, S, V]; the cache then holds the tokens.
        """
        ...


class EarlyExit:
    """The layers below an exit draft; verification runs the others, on the states that the draft left."""

    def __init__(self, runner: SplitRunner) -> None:
        self.runner: Runner = runner
        self.kind: DraftKind = ExitDraft(layer=runner.exit_layer)
        self._split = runner

    def step(self, cache: Cache, ids: np.ndarray, controls: Controls, counts: list[int]) -> StepOutput:
        """See `Draft`."""
        return self._split.draft(cache, ids, controls, counts=counts)

    def verify(
        self, cache: Cache, start: list[int], ids: np.ndarray, controls: Controls, counts: list[int]
    ) -> StepOutput:
        """See `Draft`: the last token has to pass the early layers first."""
        last = np.array([[row[max(count - 1, 0)]] for row, count in zip(ids, counts, strict=True)])
        early = self._split.draft(cache, last, controls, counts=[min(count, 1) for count in counts], logits="none")
        return joined_output(early, self._split.verify(cache))


class OtherControls:
    """The whole depth with other run-time inputs drafts: fewer tokens pass the gates, or some branches do not run.

    The K/V of drafted tokens are the draft's; verification computes them anew.
    """

    def __init__(self, runner: Runner, kind: BudgetDraft | LayersDraft) -> None:
        self.runner = runner
        self.kind: DraftKind = kind
        self._changes = kind
        self._of: Controls = {}
        self._controls: Controls = {}

    def change(self, kind: BudgetDraft | LayersDraft) -> None:
        """Draft with other run-time inputs from now on."""
        self.kind = self._changes = kind
        self._of = {}

    def step(self, cache: Cache, ids: np.ndarray, controls: Controls, counts: list[int]) -> StepOutput:
        """See `Draft`."""
        if controls is not self._of:  # the same for a whole request, and a runner copies an input when it changes
            self._of, self._controls = controls, draft_controls(self._changes, self.runner.manifest, controls)
        output = self.runner.step(cache, ids, self._controls, counts=counts)
        return StepOutput(output.logits, None)

    def verify(
        self, cache: Cache, start: list[int], ids: np.ndarray, controls: Controls, counts: list[int]
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
    """What drafts for a bundle, with the runner that it drafts on.

    Args:
        threads: within an op; None for the runtime's own choice.
        backend: the runtime.
    Raises:
        UsageError: the bundle cannot draft in this way.
    """
    check_draft(draft, bundle.manifest)
    return draft_on(open_draft_runner(bundle, draft, threads, backend), draft)


def open_draft_runner(
    bundle: Bundle, draft: DraftKind | None, threads: int | None = None, backend: Backend = "onnxruntime"
) -> Runner:
    """The runner that a draft needs, which decodes plainly too; without a draft the fastest one."""
    if isinstance(draft, ExitDraft):
        return open_split_runner(bundle, threads, backend)
    return open_runner(bundle, threads, backend)


def draft_on(runner: Runner, draft: DraftKind) -> Draft:
    """What drafts on a runner of its kind (`open_draft_runner`)."""
    if isinstance(draft, ExitDraft):
        assert isinstance(runner, SplitRunner)
        return EarlyExit(runner)
    return OtherControls(runner, draft)


def draft_controls(draft: BudgetDraft | LayersDraft, manifest: Manifest, controls: Controls) -> Controls:
    """The run-time inputs of a draft that changes nothing else of a request's.

    A branch that is left out has 0 in the layer mask, or plus infinity as its threshold.
    """
    if isinstance(draft, BudgetDraft):
        assert manifest.selection is not None
        return {**controls, **selected(manifest.selection, draft.budget)}
    name, out = ("layer_mask", 0.0) if "layer_mask" in controls else ("thresholds", np.inf)
    changed = controls[name].copy()
    for layer, branch in draft.skip:
        changed[..., layer, BRANCHES.index(branch)] = out
    return {**controls, name: changed}
