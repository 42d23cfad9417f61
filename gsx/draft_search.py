"""`gsx export --draft auto`: each exit's graphs are tried in the bundle as it is made, and the best one's stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engines.bundle import manifest as schema
from engines.bundle.bundle import Bundle
from engines.runners.select import open_runner
from engines.speculation.draft import open_draft
from engines.speculation.search import measure_exit, plain_run
from exporter.graph.assemble import GraphBuilder
from exporter.graph.weights import WeightsFile
from gsx.graph_files import write_graphs
from gsx.progress import Progress

_PROMPTS, _PROMPT_TOKENS = 4, 64


class DraftSearch:
    """Looks for the exit that gains most over plain decoding beside it.

    Args:
        work: the bundle's directory, with `model.onnx` and the weights.
        manifest: of the bundle, without a draft.
        builder, weights: what its graphs are made of.
        windows: token ids [M, S] to take prompts from.
        on_progress: called as it goes.
    """

    def __init__(
        self,
        work: Path,
        manifest: schema.Manifest,
        builder: GraphBuilder,
        weights: WeightsFile,
        windows: np.ndarray,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._work, self._manifest, self._builder, self._weights = work, manifest, builder, weights
        size = min(_PROMPT_TOKENS, windows.shape[1] // 2)
        rows = windows[:: max(1, len(windows) // _PROMPTS)][:_PROMPTS]
        self._prompts = [[int(token) for token in row[:size]] for row in rows]
        self._on_progress = on_progress

    def best(self, exits: Sequence[int]) -> schema.Manifest:
        """Measure every exit, and leave the graphs of the best. Returns: the manifest, with draft and measurements."""
        plain, found = None, []
        for number, layer in enumerate(exits):

            def tell(number: int = number, layer: int = layer) -> None:
                self._on_progress(Progress(f"measuring drafts (exit:{layer})", number, len(exits)))

            tell()
            draft = schema.ExitDraft(layer=layer)
            bundle = Bundle(self._work, self._with(schema.DraftEntry(draft=draft)))
            plain = plain or plain_run(open_runner(bundle), self._prompts)
            found.append(measure_exit(layer, open_draft(bundle, draft), plain, tell))
        best = max(found, key=lambda one: one.tokens_per_second / one.plain_tokens_per_second)
        draft = schema.ExitDraft(layer=best.layer)
        return self._with(schema.DraftEntry(draft=draft, length=best.length, measured=tuple(found)))

    def _with(self, entry: schema.DraftEntry) -> schema.Manifest:
        """Write the graphs of an exit. Returns: the manifest that names them."""
        assert isinstance(entry.draft, schema.ExitDraft)
        graphs = write_graphs(self._work, self._builder.graphs(entry.draft.layer), self._weights)
        return self._manifest.model_copy(update={"graphs": graphs, "draft": entry})
