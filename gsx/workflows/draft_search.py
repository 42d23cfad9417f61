"""`gsx export --draft auto | layers:auto`: tries drafts in the bundle during the export, and keeps the best one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gsx.workflows.graph_files import write_graphs
from gsx.workflows.skip_set_search import search_skip_sets
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.cost import step_bytes
from gsx_engines.bundle.drafts import DraftEntry, DraftMeasurement, DraftVocabulary, ExitDraft
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.draft_trials.measure import measure_draft, plain_run
from gsx_engines.draft_trials.replay import Replay
from gsx_engines.runners.select import open_runner
from gsx_engines.speculation.draft import open_draft
from gsx_exporter.graph.assemble import GraphBuilder
from gsx_exporter.graph.weights import WeightsFile
from gsx_plugins.progress import OnProgress, Progress, as_step

# Prompts that drafts are measured on; prompts that sets are searched on, and the tokens generated after each.
_PROMPTS, _PROMPT_TOKENS = 4, 64
_REPLAYED, _REPLAYED_TOKENS = 8, 64
# How many of the best sets of the search are measured.
_FINALISTS = 3


class DraftSearch:
    """Finds the draft with the largest speedup over plain decoding, timed in the same run.

    Args:
        work: the bundle's directory, with `model.onnx` and the weights.
        manifest: the bundle's manifest, without a draft.
        builder, weights: to make its graphs.
        windows: token ids [M, S] to take prompts from.
        vocabulary: what exits choose among; None for all tokens.
        on_progress: called with the progress.
    """

    def __init__(
        self,
        work: Path,
        manifest: Manifest,
        builder: GraphBuilder,
        weights: WeightsFile,
        windows: np.ndarray,
        vocabulary: DraftVocabulary | None,
        on_progress: OnProgress,
    ) -> None:
        self._work, self._manifest, self._builder, self._weights = work, manifest, builder, weights
        self._vocabulary = vocabulary
        half = windows.shape[1] // 2
        self._prompts = _beginnings(windows[:, :half], _PROMPTS)
        self._others = _beginnings(windows[:, half:], _REPLAYED)
        self._on_progress = on_progress

    def best_exit(self, exits: Sequence[int]) -> Manifest:
        """Measure every exit, and write the graphs of the best. Returns: the manifest, with draft and measurements."""
        plain, found = None, []
        for number, layer in enumerate(exits):
            step = Progress(f"measuring drafts (exit:{layer})", number, len(exits))
            self._on_progress(step)
            draft = ExitDraft(layer=layer)
            bundle = Bundle(self._work, self._with(DraftEntry(draft=draft, vocabulary=self._vocabulary)))
            plain = plain or plain_run(open_runner(bundle), self._prompts)
            found.append(measure_draft(open_draft(bundle, draft), plain, as_step(self._on_progress, step)))
        return self._with(_best_of(found).model_copy(update={"vocabulary": self._vocabulary}))

    def best_layers(self) -> Manifest:
        """Search for the set of branches to leave out, and measure the best. Returns: the manifest, with draft."""
        bundle = Bundle(self._work, self._manifest)
        runner = open_runner(bundle)
        self._on_progress(Progress("searching skip sets: generating text"))
        candidates = search_skip_sets(
            Replay(runner, self._others, _REPLAYED_TOKENS),
            self._manifest.decoder.num_layers,
            self._manifest.skippable,
            step_bytes(bundle),
            self._on_progress,
        )[:_FINALISTS]
        plain, found = plain_run(runner, self._prompts), []
        for number, candidate in enumerate(candidates):
            self._on_progress(Progress("measuring skip sets", number, len(candidates)))
            found.append(measure_draft(open_draft(bundle, candidate.draft), plain))
        return self._manifest.model_copy(update={"draft": _best_of(found)})

    def _with(self, entry: DraftEntry) -> Manifest:
        """Write the graphs of an exit. Returns: the manifest with them."""
        assert isinstance(entry.draft, ExitDraft)
        graphs = write_graphs(self._work, self._builder.graphs(entry.draft.layer), self._weights)
        return self._manifest.model_copy(update={"graphs": graphs, "draft": entry})


def _best_of(found: Sequence[DraftMeasurement]) -> DraftEntry:
    """The draft with the largest speedup, and the measurements of all."""
    best = max(found, key=lambda measured: measured.tokens_per_second / measured.plain_tokens_per_second)
    return DraftEntry(draft=best.draft, length=best.length, measured=tuple(found))


def _beginnings(windows: np.ndarray, count: int) -> list[list[int]]:
    """Prompts from windows [M, S] at even distances in the text."""
    rows = windows[:: max(1, len(windows) // count)][:count, :_PROMPT_TOKENS]
    return [[int(token) for token in row] for row in rows]
