"""The portable graph as any ONNX Runtime runs it: past in, present out, nothing lowered.

Parity is measured on this stage because it executes the exported file unchanged, with two exceptions: an 8-bit K/V
cache is rounded (`gsx_engines/lowering/kv_cache.py`) but kept in the graph's type, and bfloat16, for which the CPU has
no matrix products, becomes float32 (`gsx_engines/lowering/widen.py`). It can also return values from inside the graph.
It copies the K/V cache at every call: `onnxruntime.py` is the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from gsx_engines.bundle import tensor_names
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering.kv_cache import round_cache
from gsx_engines.lowering.widen import in_float32
from gsx_engines.runners.base import Call, ExitState, Logits, StageOutput, grown
from gsx_engines.runners.kept import KeptTable
from gsx_engines.runners.session import open_session, session_config
from gsx_plugins.graph import Graph

# The type in which this stage runs a graph of each precision.
TYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),
}


def portable_model(bundle: Bundle, graph: str = "model") -> onnx.ModelProto:
    """A graph of a bundle, without its weights, as it is run on a CPU: see above."""
    manifest = bundle.manifest
    model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
    if manifest.precision == "bf16":
        in_float32(model)
    if manifest.kv_cache is not None:
        portable = Graph(model.graph)
        round_cache(portable, manifest.kv_cache, manifest.layers_of(graph))
        portable.store()
    return model


class PortableStage:
    """Runs a graph of a bundle as it is; see `Stage`.

    Args:
        bundle: an opened bundle.
        graph: `model`, `draft` or `verify`.
        capture: names of values inside the graph that every call leaves in `captured`.
        threads: threads within an op; None for ONNX Runtime's own choice.
    Raises:
        BundleError: no such graph, or ONNX Runtime does not load it.
    """

    def __init__(
        self, bundle: Bundle, graph: str = "model", *, capture: Sequence[str] = (), threads: int | None = None
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.dtype = TYPES[self.manifest.precision]
        self.layers = self.manifest.layers_of(graph)
        self.captured: dict[str, np.ndarray] = {}
        self._capture = list(capture)
        model = portable_model(bundle, graph)
        self._inputs = {value.name for value in model.graph.input}
        outputs = {value.name for value in model.graph.output}
        self._exits = [name for name in self.manifest.exit_state if name in outputs]
        self._table = KeptTable(self.manifest, self.layers)
        self.counts_tokens = True
        self._kept = [tensor_names.kept_index(layer, branch) for layer, branch in self._table.places]
        for name in dict.fromkeys([*self._kept, *capture]):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        config = session_config(self.manifest)
        self._session = open_session(model.SerializeToString(), bundle.directory, threads, config)

    def new_memory(self, batch: int, capacity: int) -> dict[str, np.ndarray]:
        """K and V by input name, [B, K/V heads, T, D]: T is no longer than needed, and every call gives new arrays."""
        shape = self.manifest.decoder
        empty = np.zeros((batch, shape.num_kv_heads, 0, shape.head_dim), self.dtype)
        return dict.fromkeys(tensor_names.past_of(shape.caches_of(self.layers)), empty)

    def run(self, memory: dict[str, np.ndarray], call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`."""
        past = max(call.lengths)
        steps = np.arange(call.ids.shape[1])
        lengths, counts = np.array(call.lengths)[:, None], np.array(call.counts)[:, None]
        # Columns beyond a sequence's own length are padding, among the cached ones and among the new ones.
        mask = np.concatenate([np.arange(past) < lengths, steps < counts], axis=1)
        positions = lengths + steps
        for name, value in memory.items():
            memory[name] = value[:, :, :past]
        results = self.execute(
            memory, call.ids, mask.astype(np.int64), positions, call.controls, state, logits=logits != "none"
        )
        for name, value in memory.items():
            memory[name] = _closed_up(value, call, past)
        scores = self._logits(results.get(tensor_names.LOGITS), call, logits)
        state = {name: results[name] for name in self._exits} or None
        kept = self._table.rows([results[name] for name in self._kept], *call.ids.shape)
        return StageOutput(scores, state, *self._table.counts(kept))

    def copy(self, memory: dict[str, np.ndarray], source: int, target: int, length: int) -> None:
        """See `Stage`."""
        for name, value in memory.items():
            moved = memory[name] = value.copy()  # the session may own the array that it returned
            moved[target, :, :length] = value[source, :, :length]

    def execute(
        self,
        memory: dict[str, np.ndarray],
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        controls: RuntimeValues,
        state: ExitState | None = None,
        *,
        logits: bool = True,
    ) -> dict[str, np.ndarray]:
        """Run the graph on inputs as a client may give them, with padding anywhere.

        Args:
            memory: past K and V; those of this call are appended for all columns, padding included.
            input_ids, position_ids: [B, S] int64.
            attention_mask: [B, past + S] int64: 1 for a token, 0 for padding.
            controls: as in `Call`.
            state: what enters the second half of a split model.
            logits: whether they are computed.
        Returns: outputs and captured values by name, except K and V.
        """
        feeds = {
            tensor_names.INPUT_IDS: input_ids,
            tensor_names.POSITION_IDS: position_ids,
            tensor_names.ATTENTION_MASK: attention_mask,
        }
        feeds |= {**controls, **(state or {}), **memory}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        presents = {name: tensor_names.present_after(name) for name in memory}
        wanted = [tensor_names.LOGITS] if logits else []
        wanted += [*self._exits, *presents.values(), *self._kept, *self._capture]
        results = dict(zip(wanted, self._session.run(wanted, feeds), strict=True))
        for name, present in presents.items():
            memory[name] = results.pop(present)
        self.captured = {name: results[name] for name in self._capture}
        return results

    def _logits(self, scores: np.ndarray | None, call: Call, logits: Logits) -> np.ndarray:
        if scores is None:
            return np.zeros((len(call.ids), 0, self.manifest.decoder.vocab_size), np.float32)
        scores = scores.astype(np.float32, copy=False)
        if logits == "all":
            return scores
        return scores[np.arange(len(scores)), [max(count - 1, 0) for count in call.counts]][:, None]


def _closed_up(present: np.ndarray, call: Call, past: int) -> np.ndarray:
    """K or V [B, heads, past + S, D] with the gap between each sequence's old and new tokens closed."""
    for row, (start, count) in enumerate(zip(call.lengths, call.counts, strict=True)):
        if start < past and count:
            present[row, :, start : start + count] = present[row, :, past : past + count].copy()
    return present[:, :, : max(grown(call.lengths, call.counts))]
