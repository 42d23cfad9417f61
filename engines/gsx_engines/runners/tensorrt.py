"""TensorRT and TensorRT-RTX: an engine of the bundle on a GPU, with K/V on the device.

The logic of a call (profile, window, positions of its tokens, what the host counts) is here and does not touch CUDA;
`gsx_engines/tensorrt/execution.py` owns the device. So the same logic also runs on a CPU over the lowered graph, which
is how it is tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from gsx_engines.bundle import tensor_names
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues, is_by_sequence, rows_of
from gsx_engines.bundle.counting import kept_count
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.errors import EngineError, LostGpuError
from gsx_engines.likeliest import LikelyLogits, Scores
from gsx_engines.lowering.for_tensorrt.task import (
    KEPT,
    KEPT_BY_TOKEN,
    LIKELY_IDS,
    LIKELY_LOGITS,
    LIKELY_TOTAL,
    LOGITS_AT,
    RUN,
    WRITE_AT,
    K,
)
from gsx_engines.runners.base import Call, ExitState, Logits, StageOutput
from gsx_engines.runners.joining import in_time, joined_rows
from gsx_engines.runners.kept import KeptTable
from gsx_engines.tensorrt.backend import Backend
from gsx_engines.tensorrt.bound import BoundBuffers
from gsx_engines.tensorrt.profile_choice import choose_profile, most_rows, most_tokens
from gsx_plugins.domain import CHOICES

# The window is a multiple of this many columns, so that shapes seldom change while the cache grows: TensorRT compiles
# or tunes for particular shapes, and a CUDA graph holds for one set of them.
WINDOW_STEP = 64
# Sequences of a call run together while their numbers of tokens differ by no more than this. Below, a call's time is
# that of reading the weights, and padding is free; above, a long prompt would make a prompt of every other sequence.
_MOST_PADDING = 32
# Kinds of calls whose bindings are kept: making them takes longer than all else before a call.
_MOST_BOUND = 64
# A sequence's K or V must be a multiple of so many elements for TensorRT to take its address: of 256 bytes, in 16 bits.
_ALIGNED_ELEMENTS = 128


class Engine(Protocol):
    """An engine that can be called; `CudaEngine` is the one that runs on a GPU."""

    def buffer(self, shape: tuple[int, ...], name: str) -> Any:
        """Memory of the runtime for an input or output, filled with zeros."""
        ...

    def move(self, buffer: Any, shape: tuple[int, ...], source: int, target: int) -> None:
        """Copy a row of a buffer [rows, ..] over another one."""
        ...

    def rows(self, buffer: Any, shape: tuple[int, ...], rows: slice) -> Any:
        """Some neighbouring rows of a buffer [rows, ..], to be used as one."""
        ...

    def read(self, buffer: Any, shape: tuple[int, ...], row: int) -> np.ndarray:
        """A row of a buffer [rows, ..] of float32."""
        ...

    def run(
        self,
        profile: int,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[Any, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """One call: inputs from the host, memory that persists, and the shapes of the results wanted on the host."""
        ...


@dataclass(frozen=True)
class _Memory:
    """K/V buffers by input name, each [B, K/V heads, capacity, D]; what is behind the inputs of which only the size is
    read; and by kind of call, what the engine binds."""

    buffers: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    unread: Any = None
    bound: dict[object, BoundBuffers] = field(default_factory=dict)


class _Plan:
    """An engine and its description.

    Args:
        entry: the set of engines that it belongs to.
        graph: that it is of.
        engine: the engine.
    """

    def __init__(self, entry: EngineEntry, graph: str, engine: Engine) -> None:
        self.entry, self.engine, self.profiles = entry, engine, entry.profiles
        self.inputs = {value.name: value for value in entry.graphs[graph].inputs}
        self.outputs = {value.name: value for value in entry.graphs[graph].outputs}
        # Of an engine for steps of one size: sequences, tokens of each.
        self.size = (entry.profiles[0].batch.most, entry.profiles[0].tokens.most) if entry.kv_layout == "step" else None
        # Where it gives the likeliest tokens, all logits stay in memory of its own. (Steps of gsx 0.1.0 give all.)
        self.logits = None
        if LIKELY_IDS in self.outputs:
            shape = tuple(map(int, self.outputs[tensor_names.LOGITS].shape))
            self.logits = (engine.buffer(shape, tensor_names.LOGITS), shape)
        self.calls = 0

    def likely(self, found: Mapping[str, np.ndarray], tokens: np.ndarray) -> LikelyLogits:
        """The likeliest tokens of a call. Args: tokens: [B, O], behind which tokens of their sequences."""
        assert self.logits is not None
        (buffer, (batch, length, size)), call = self.logits, self.calls

        def fetch(row: int, token: int) -> np.ndarray:
            assert self.calls == call, "the logits of a call are asked for after the next one"
            return self.engine.read(buffer, (batch * length, size), row * length + int(tokens[row, token]))

        rows = np.arange(batch)[:, None]
        ids, logits, totals = (found[name][rows, tokens] for name in (LIKELY_IDS, LIKELY_LOGITS, LIKELY_TOTAL))
        return LikelyLogits(ids, logits, totals, size, fetch)


class TensorRTStage:
    """Runs the engine of a graph; see `Stage`.

    Args:
        manifest: of the bundle.
        entry: the set of engines that this one belongs to.
        graph: `model`, `draft` or `verify`.
        engine: the engine.
        steps: engines of the same graph for steps of one size each, with the sets that they belong to. They share the
            K/V buffers, so their capacity is the same.
    """

    def __init__(
        self,
        manifest: Manifest,
        entry: EngineEntry,
        graph: str,
        engine: Engine,
        steps: Sequence[tuple[EngineEntry, Engine]] = (),
    ) -> None:
        self.manifest = manifest
        self.layers = manifest.layers_of(graph)
        self._entry, self._engine = entry, engine
        self._plan = _Plan(entry, graph, engine)
        plans = [_Plan(own, graph, one) for own, one in steps]
        self._steps = {plan.size: plan for plan in plans}
        self._inputs, self._outputs = self._plan.inputs, self._plan.outputs
        self._exits = [name for name in manifest.exit_state if name in self._outputs]
        self._table = KeptTable(manifest, self.layers)
        # Whether a call may run some of the rows of the memory.
        caches = [value.shape[1:] for name, value in self._inputs.items() if name.startswith(tensor_names.PAST)]
        self._splits = all(math.prod(map(int, sizes)) % _ALIGNED_ELEMENTS == 0 for sizes in caches)
        # Of rules that the host decides for: the input of each branch that may be skipped, by layer and branch.
        places = [(f"{RUN}{layer}.{branch}", layer, BRANCHES.index(branch)) for layer, branch in self._table.places]
        self._runs = [place for place in places if place[0] in self._inputs]
        # Engines that gsx 0.1.0 built do not.
        told = all(KEPT_BY_TOKEN in one.outputs for one in (self._plan, *plans))
        self.counts_tokens = told or not self._table.places

    def new_memory(self, batch: int, capacity: int) -> _Memory:
        """See `Stage`. The buffers always have the engine's own capacity.

        Raises:
            EngineError: the engine has no room for so many tokens or sequences.
        """
        build = f"gsx build --backend {self._entry.backend}"
        if capacity > self._entry.capacity:
            raise EngineError(
                "the engine's K/V buffers are too short for this request",
                expected=f"at most {self._entry.capacity} tokens",
                found=f"{capacity}, prompt and new tokens together",
                todo=f"ask for fewer new tokens, or {build} --context {capacity}",
            )
        if not most_tokens(self._entry.profiles, batch):
            raise EngineError(
                "no profile of the engine allows so many sequences",
                expected="batch " + ", ".join(f"{p.batch.least} to {p.batch.most}" for p in self._entry.profiles),
                found=str(batch),
                todo=f"{build} --batch {batch}",
            )
        shapes = {
            name: tuple(batch if axis == "batch" else int(axis) for axis in value.shape)
            for name, value in self._inputs.items()
            if name.startswith(tensor_names.PAST)
        }
        buffers = {name: self._engine.buffer(shape, name) for name, shape in shapes.items()}
        unread = self._engine.buffer((most_rows(self._entry.profiles),), self._runs[0][0]) if self._runs else None
        return _Memory(buffers, shapes, unread)

    def run(self, memory: _Memory, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`. More tokens than a profile takes are split over several calls.

        Raises:
            EngineError: a call beyond the engine's profiles or, with rank selection, one that would have to be split.
        """
        length = call.ids.shape[1]
        most = most_tokens(self._entry.profiles, len(call.ids))
        if length <= most:
            return self._run_parts(memory, call, state, logits)
        if self.manifest.depends_on_call:
            ranks = self.manifest.selection is not None
            needs = "rank selection needs" if ranks else "loops that share a cache need"
            raise EngineError(
                f"the prompt does not fit into one call of the engine, and {needs} all tokens in one call",
                expected=f"at most {most} tokens",
                found=str(length),
                todo=f"gsx build --profile prefill:2-{length} --profile decode:1"
                + (", or export with --select threshold" if ranks else ""),
            )
        outputs = []
        for start in range(0, length, most):
            part = slice(start, start + most)
            counts = [min(max(count - start, 0), most) for count in call.counts]
            lengths = [length + min(count, start) for length, count in zip(call.lengths, call.counts, strict=True)]
            piece = Call(call.ids[:, part], counts, lengths, call.controls)
            output = self._run_parts(memory, piece, _tokens_of(state, part), logits)
            outputs.append(replace(output, scores=output.logits))
        return _joined(outputs, call, most, logits)

    def copy(self, memory: _Memory, source: int, target: int, length: int) -> None:
        """See `Stage`. Whole rows are copied, in one copy for each buffer."""
        for name, buffer in memory.buffers.items():
            self._engine.move(buffer, memory.shapes[name], source, target)

    def _run_parts(self, memory: _Memory, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """Run a call's sequences, those together that can be."""
        rows_together = self._parts_of(call)
        if rows_together == [slice(0, len(call.counts))]:
            return self._run_part(memory, 0, call, state, logits)
        parts = []
        for rows in rows_together:
            counts = call.counts[rows]
            tokens = slice(max(counts))
            part = Call(call.ids[rows, tokens], counts, call.lengths[rows], rows_of(call.controls, rows))
            entering = None if state is None else {name: value[rows, ..., tokens, :] for name, value in state.items()}
            output = self._run_part(memory, rows.start, part, entering, logits)
            parts.append((rows, replace(output, scores=output.logits)))  # which the next part may overwrite
        return joined_rows(parts, call, logits)

    def _parts_of(self, call: Call) -> list[slice]:
        """Rows that run together: neighbours that have tokens, about as many, and run the same branches."""
        everything = [slice(0, len(call.counts))]
        if not any(call.counts) or not (self._splits or self._runs):
            return everything
        if self.manifest.selection is not None and self.manifest.selection.mode == "rank":
            return everything  # which is among the tokens of a whole call
        parts: list[slice] = []
        kinds = [self._branches_of(call, row) for row in range(len(call.counts))] if self._runs else None
        for row, count in enumerate(call.counts):
            if not count:
                continue
            last = parts[-1] if parts and parts[-1].stop == row else None
            together = [*call.counts[last], count] if last else []
            same = kinds is None or (kinds[row] is not None and kinds[row] == kinds[row - 1])
            if last and same and max(together) - min(together) <= _MOST_PADDING:
                parts[-1] = slice(last.start, row + 1)
            else:
                parts.append(slice(row, row + 1))
        return parts if self._runs or all(self._fits(call, part) for part in parts) else everything

    def _fits(self, call: Call, rows: slice) -> bool:
        """Whether a profile takes these rows of a call by themselves."""
        sizes = rows.stop - rows.start, max(call.counts[rows])
        return any(
            p.batch.least <= sizes[0] <= p.batch.most and p.tokens.least <= sizes[1] <= p.tokens.most
            for p in self._entry.profiles
        )

    def _branches_of(self, call: Call, row: int) -> bytes | None:
        """The branches that all tokens of a sequence run; None if some of them run all, and others do not."""
        full = _full(call, row)
        if 0 < full < call.counts[row]:
            return None
        return self._chosen(call.controls, row, full > 0).tobytes()

    def _chosen(self, controls: RuntimeValues, row: int, full: bool) -> np.ndarray:
        """Which of the branches that may be skipped run, [n] bool."""
        if "loops" in controls:
            loops, count = self.manifest.decoder.loops, controls["loops"][min(row, len(controls["loops"]) - 1)]
            assert loops is not None
            return np.array([(loops.loop_of(layer) or 0) < count for _, layer, _ in self._runs])
        mask = controls["layer_mask"][min(row, len(controls["layer_mask"]) - 1)]
        return np.array([full or mask[layer, branch] > 0.5 for _, layer, branch in self._runs])

    def _run_part(
        self, memory: _Memory, start: int, call: Call, state: ExitState | None, logits: Logits
    ) -> StageOutput:
        """Run sequences together; in two calls if a single one has tokens that run every branch, and others."""
        full = _full(call, 0) if self._runs and len(call.counts) == 1 else 0
        if not 0 < full < call.counts[0]:
            return self._run(memory, start, call, state, logits)
        outputs = []
        for columns in (slice(0, full), slice(full, call.ids.shape[1])):
            part = Call(
                call.ids[:, columns],
                [min(call.counts[0], columns.stop) - columns.start],
                [call.lengths[0] + columns.start],
                call.controls,
            )
            wanted = logits if columns.start or logits == "all" else "none"
            output = self._run(memory, start, part, _tokens_of(state, columns), wanted)
            outputs.append(replace(output, scores=output.logits))  # which the next call may overwrite
        return in_time(*outputs)

    def _run(self, memory: _Memory, start: int, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """One call of an engine. Args: start: row of the first sequence."""
        batch, length = call.ids.shape
        plan = self._steps.get((batch, length), self._plan)
        lengths, counts = np.array(call.lengths), np.array(call.counts)
        steps = np.arange(length)
        filled = lengths + counts
        # The window covers the rows beyond a sequence's count too: while there is room, no row of the mask is empty.
        capacity = self._entry.capacity
        window = capacity if plan.size else window_of(int(lengths.max()) + length, capacity)
        last = np.maximum(counts - 1, 0)[:, None]
        rows = np.arange(batch)[:, None] * length
        given: dict[str, np.ndarray] = {
            tensor_names.INPUT_IDS: call.ids,
            tensor_names.ATTENTION_MASK: np.arange(window) < filled[:, None],
            tensor_names.POSITION_IDS: lengths[:, None] + steps,
            WRITE_AT: lengths,
            LOGITS_AT: rows + (steps if logits == "all" or plan.size else last),
        }
        if K in plan.inputs:
            valid = call.ids[steps < counts[:, None]]
            given[K] = np.array([self._count(valid, float(call.controls["budget"]))])
        feeds = {name: np.asarray(value, np.int64) for name, value in given.items() if name in plan.inputs}
        feeds |= {name: value for name, value in call.controls.items() if name in plan.inputs}
        if plan.size:  # which has no open axis for values that stand for all sequences
            for name, value in call.controls.items():
                if name in feeds and is_by_sequence(name, value) and len(value) < batch:
                    feeds[name] = np.repeat(value, batch, axis=0)
        feeds |= state or {}
        runs = self._chosen(call.controls, 0, _full(call, 0) > 0) if self._runs else np.empty(0, bool)
        buffers = self._bound(memory, plan, slice(start, start + batch), length, runs)
        sizes = {"batch": batch, "sequence": length, "logits_columns": feeds[LOGITS_AT].shape[1]}
        results = {
            name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in value.shape)
            for name, value in plan.outputs.items()
            if name not in buffers
        }
        profile = choose_profile(plan.profiles, batch, length, window)
        plan.calls += 1  # first: a call that fails may have overwritten the logits of the one before
        found = plan.engine.run(profile, feeds, buffers, results)
        scores: Scores
        if plan.logits is not None and logits != "none":
            scores = plan.likely(found, last if logits == "last" else np.broadcast_to(steps, (batch, length)))
        elif plan.logits is not None:
            scores = np.empty((batch, 0, plan.logits[1][-1]), np.float32)
        else:
            scores = found[tensor_names.LOGITS]
            if plan.size and logits == "last":
                scores = np.take_along_axis(scores, last[:, :, None], axis=1)
            scores = scores[:, :0] if logits == "none" else scores
        kept = self._table.of(found.get(KEPT))
        kept_by_sequence = None
        kept_by_token = found.get(KEPT_BY_TOKEN)
        if not self._table.places:
            kept, kept_by_sequence, kept_by_token = self._table.counts(np.zeros((0, batch, length), np.bool_))
        if self._runs:
            kept_by_sequence = self._table.of_each(runs[:, None] * np.array(call.counts))
            kept = kept_by_sequence.sum(axis=0)
        return StageOutput(
            scores=scores,
            state={name: found[name] for name in self._exits} or None,
            kept=kept,
            kept_by_sequence=kept_by_sequence,
            kept_by_token=kept_by_token,
        )

    def _bound(self, memory: _Memory, plan: _Plan, rows: slice, length: int, runs: np.ndarray) -> BoundBuffers:
        """The memory of a call that stays on the device: the same object for the same rows, sizes and branches."""
        key = (plan.size, rows.start, rows.stop, length if self._runs else 0, runs.tobytes())
        if (known := memory.bound.get(key)) is not None:
            return known
        batch, buffers = rows.stop - rows.start, BoundBuffers()
        for name, buffer in memory.buffers.items():
            shape = memory.shapes[name]
            used = buffer if batch == shape[0] else self._engine.rows(buffer, shape, rows)
            for shared in (name, tensor_names.present_after(name)):
                buffers[shared] = (used, (batch, *shape[1:]))
        for (name, _, _), run in zip(self._runs, runs, strict=True):
            buffers[name] = (memory.unread, (batch * length if run else 0,))
        if plan.logits is not None:
            buffers[tensor_names.LOGITS] = plan.logits
        if len(memory.bound) == _MOST_BOUND:
            memory.bound.clear()
        memory.bound[key] = buffers
        return buffers

    def _count(self, ids: np.ndarray, budget: float) -> int:
        """K of rank selection for the valid tokens of a call: the best ones, plus all end-of-text tokens."""
        ends = int(np.isin(ids, self.manifest.decoder.eos_ids).sum())
        return kept_count(ids.size - ends, budget) + ends


def _full(call: Call, row: int) -> int:
    """How many of a sequence's tokens run every branch."""
    until = call.controls.get("full_until")
    if until is None:
        return 0
    return min(max(int(until[min(row, len(until) - 1)]) - call.lengths[row], 0), call.counts[row])


def window_of(filled: int, capacity: int) -> int:
    """How many columns of the cache a call reads: the filled ones, rounded up to a multiple of `WINDOW_STEP`."""
    return min(-(-filled // WINDOW_STEP) * WINDOW_STEP, capacity)


def _tokens_of(state: ExitState | None, part: slice) -> ExitState | None:
    """The part of an exit state that belongs to some tokens."""
    if state is None:
        return None
    return {name: array[..., part, :] for name, array in state.items()}


def _joined(outputs: list[StageOutput], call: Call, most: int, logits: Logits) -> StageOutput:
    """The outputs of the pieces of a call as one; each piece has `most` tokens, except the last."""
    scores = np.concatenate([output.logits for output in outputs], axis=1)
    if logits == "last":  # for each sequence, from the piece that holds its last token
        piece = np.maximum(np.array(call.counts) - 1, 0) // most
        scores = scores[np.arange(len(scores)), piece][:, None]
    states = [output.state for output in outputs if output.state is not None]
    joined = {name: np.concatenate([state[name] for state in states], axis=-2) for name in (states or [{}])[0]}
    kept = [output.kept for output in outputs if output.kept is not None]
    by_token = [output.kept_by_token for output in outputs if output.kept_by_token is not None]
    return StageOutput(
        scores=scores,
        state=joined or None,
        kept=np.sum(kept, axis=0) if kept else None,
        kept_by_token=np.concatenate(by_token, axis=1) if len(by_token) == len(outputs) else None,
    )


def open_stage(
    bundle: Bundle,
    backend: Backend,
    graph: str = "model",
    *,
    cuda_graphs: bool = True,
    beside: TensorRTStage | None = None,
) -> TensorRTStage:
    """The engine of a bundle's graph on this machine's GPU.

    Args:
        beside: a stage that never runs at the same time; both compute in the same memory of the GPU.
        cuda_graphs: record calls of the same shapes and replay them. Engines in which only the GPU knows how many
            rows a plugin keeps cannot be recorded; they run without.
    Raises:
        EngineError: no engines, no GPU, or engines that do not fit this machine; says what differs and how to fix it.
            Engines for steps that cannot be used are left out with a warning: the others do their work.
    """
    from gsx_engines.tensorrt import cuda
    from gsx_engines.tensorrt.execution import CudaEngine
    from gsx_engines.tensorrt.kernel_cache import kernel_cache_path
    from gsx_engines.tensorrt.loading import EngineSet, build_command, find_engines, find_steps, left_out, read_engine

    def opened(engines: EngineSet, beside: CudaEngine | None) -> CudaEngine:
        plan = read_engine(engines, graph, build_command(bundle, engines.entry))
        made = engines.entry.graphs[graph]
        recordable = not any(made.forms.get(choice) == "plugin" for choice in CHOICES)
        kernels = None
        if (device := cuda.device()) is not None and backend == "tensorrt-rtx":
            kernels = kernel_cache_path(made.sha256, device.capability)
        return CudaEngine(
            backend,
            plan,
            library=engines.library,
            cuda_graphs=cuda_graphs and recordable,
            kernels=kernels,
            fixed_rows=recordable,
            beside=beside,
        )

    found = find_engines(bundle, backend)
    other = None if beside is None else beside._engine
    engine = opened(found, other if isinstance(other, CudaEngine) else None)
    steps = []
    for own in find_steps(bundle, found):
        try:
            steps.append((own.entry, opened(own, engine)))
        except LostGpuError:
            raise
        except EngineError as error:  # a damaged file, or no memory for the weights once more
            left_out(error)
    return TensorRTStage(bundle.manifest, found.entry, graph, engine, steps)
