"""TensorRT and TensorRT-RTX: an engine of the bundle on a GPU, with K/V on the device.

The logic of a call (profile, window, where its tokens stand, what the host counts) is here and knows no CUDA;
`engines/tensorrt/execution.py` owns the device. So the same logic runs on a CPU over the lowered graph, which is how it
is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engines.building.profiles import choose_profile, most_tokens
from engines.bundle.bundle import Bundle
from engines.bundle.counting import kept_count
from engines.bundle.manifest import EngineEntry, Manifest
from engines.errors import EngineError
from engines.lowering import tensorrt as lowering
from engines.runners.base import Cache, Logits, StepOutput
from engines.runners.portable import gated_places
from engines.tensorrt.backend import Backend

# The window is a multiple of this many columns, so that a call's shapes change seldom while the cache grows: TensorRT
# compiles or tunes for shapes, and a CUDA graph is for one set of them.
WINDOW_STEP = 64
_GRAPH = "model"


class Engine(Protocol):
    """An engine that can be called; `CudaEngine` is the one on a GPU."""

    def buffer(self, shape: tuple[int, ...], name: str) -> Any:
        """Memory of the runtime's own, filled with zeros, for an input or output."""
        ...

    def run(
        self,
        profile: int,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[Any, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """One call: inputs from the host, memory that stays, and the shapes of what is wanted on the host."""
        ...


# Opens the engine of a graph, by the graph's name.
OpenEngine = Callable[[str], Engine]


@dataclass(frozen=True)
class _Memory:
    """K/V buffers by input name, each [B, kv heads, capacity, D]."""

    buffers: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


class TensorRTRunner:
    """Runs a bundle's engines; see `Runner` for the interface.

    Args:
        manifest: of the bundle.
        entry: the engines.
        open_engine: gives the engine of a graph.
    """

    def __init__(self, manifest: Manifest, entry: EngineEntry, open_engine: OpenEngine) -> None:
        self.manifest = manifest
        self._entry, self._engine = entry, open_engine(_GRAPH)
        self._graph = entry.graphs[_GRAPH]
        self._inputs = {value.name: value for value in self._graph.inputs}
        places = [(layer, ("attn", "mlp").index(branch)) for layer, branch in gated_places(manifest)]
        self._rows, self._columns = np.array(places, np.int64).reshape(-1, 2).T

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`. The buffers have the engine's own capacity, whatever is asked for.

        Raises:
            EngineError: the engine has no room for so many columns or sequences.
        """
        if capacity > self._entry.capacity:
            raise EngineError(
                "the engine's K/V buffers are too short for this request",
                expected=f"at most {self._entry.capacity} columns",
                found=f"{capacity}, prompt and new tokens together",
                todo=f"ask for fewer new tokens, or gsx build --backend {self._entry.backend} --context {capacity}",
            )
        if not most_tokens(self._entry.profiles, batch):
            raise EngineError(
                "no profile of the engine takes so many sequences",
                expected="batch " + ", ".join(f"{p.batch.least} to {p.batch.most}" for p in self._entry.profiles),
                found=str(batch),
                todo=f"gsx build --backend {self._entry.backend} --batch {batch}",
            )
        shapes = {
            name: tuple(batch if axis == "batch" else int(axis) for axis in value.shape)
            for name, value in self._inputs.items()
            if name.startswith("past_key_values.")
        }
        buffers = {name: self._engine.buffer(shape, name) for name, shape in shapes.items()}
        return Cache(batch, self._entry.capacity, 0, _Memory(buffers, shapes))

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        select: np.ndarray | None,
        logits: Logits = "last",
    ) -> StepOutput:
        """See `Runner`. More tokens than a profile takes go through in several calls.

        Raises:
            EngineError: a call beyond the engine's profiles, or, with rank selection, one that had to be split.
        """
        batch, length = input_ids.shape
        if cache.length + length > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} columns, {cache.length + length} are needed")
        most = most_tokens(self._entry.profiles, batch)
        ranks = self.manifest.selection is not None and self.manifest.selection.mode == "rank"
        if length > most and ranks:
            raise EngineError(
                "the prompt is longer than a call of the engine, and rank selection chooses among a whole call",
                expected=f"at most {most} tokens",
                found=str(length),
                todo=f"gsx build --profile prefill:2-{length} --profile decode:1, or export with --select threshold",
            )
        outputs = []
        for start in range(0, length, most):
            stop = min(start + most, length)
            columns = cache.length + stop - start
            call = input_ids[:, start:stop], attention_mask[:, :columns], position_ids[:, start:stop]
            outputs.append(self._call(cache, *call, select, logits))
        scores = outputs[-1].logits
        if logits == "all" and len(outputs) > 1:
            scores = np.concatenate([output.logits for output in outputs], axis=1)
        counts = [output.kept for output in outputs if output.kept is not None]
        return StepOutput(scores, np.sum(counts, axis=0) if counts else None)

    def _call(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        select: np.ndarray | None,
        logits: Logits,
    ) -> StepOutput:
        batch, length = input_ids.shape
        filled = cache.length + length
        window = window_of(filled, cache.capacity)
        mask = np.zeros((batch, window), np.int64)
        mask[:, :filled] = attention_mask
        wanted = np.arange(length) if logits == "all" else np.array([length - 1])
        given = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": position_ids,
            lowering.WRITE_AT: np.array([cache.length]),
            lowering.LOGITS_AT: wanted,
        }
        if select is not None and lowering.K in self._inputs:
            valid = mask[:, cache.length : filled] != 0
            given[lowering.K] = np.array([self._count(input_ids[valid], float(select))])
        feeds = {name: np.asarray(value, np.int64) for name, value in given.items() if name in self._inputs}
        for name in ("thresholds", "budget"):
            if select is not None and name in self._inputs:
                feeds[name] = np.asarray(select, np.float32)
        memory: _Memory = cache.memory
        buffers = {}
        for name, buffer in memory.buffers.items():
            for shared in (name, name.replace("past_key_values.", "present.")):
                buffers[shared] = (buffer, memory.shapes[name])
        results: dict[str, tuple[int, ...]] = {"logits": (batch, len(wanted), self.manifest.decoder.vocab_size)}
        if len(self._rows):
            results[lowering.KEPT] = (len(self._rows),)
        profile = choose_profile(self._entry.profiles, batch, length, window)
        found = self._engine.run(profile, feeds, buffers, results)
        cache.length = filled
        kept = None
        if len(self._rows):
            kept = np.zeros((self.manifest.decoder.num_layers, 2), np.int64)
            kept[self._rows, self._columns] = found[lowering.KEPT]
        return StepOutput(found["logits"], kept)

    def _count(self, ids: np.ndarray, budget: float) -> int:
        """K of rank selection for the valid tokens of a call: the best of them, and end-of-text on top."""
        ends = int(np.isin(ids, self.manifest.decoder.eos_ids).sum())
        return kept_count(ids.size - ends, budget) + ends


def window_of(filled: int, capacity: int) -> int:
    """Columns of the cache that a call reads: the filled ones, rounded up to `WINDOW_STEP`."""
    return min(-(-filled // WINDOW_STEP) * WINDOW_STEP, capacity)


def open_tensorrt(bundle: Bundle, backend: Backend, *, cuda_graphs: bool = True) -> TensorRTRunner:
    """The runner of a bundle's engines on this machine's GPU.

    Raises:
        EngineError: no engines, no GPU, or engines that do not fit this machine; says what differs and what mends it.
    """
    from engines.tensorrt.execution import CudaEngine
    from engines.tensorrt.loading import find_engines, read_engine

    found = find_engines(bundle, backend)
    command = f"gsx build {bundle.directory} --backend {backend}"

    def open_engine(graph: str) -> CudaEngine:
        plan = read_engine(found, graph, command)
        return CudaEngine(backend, plan, library=found.library, cuda_graphs=cuda_graphs)

    return TensorRTRunner(bundle.manifest, found.entry, open_engine)
