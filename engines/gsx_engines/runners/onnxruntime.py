"""The fast path on ONNX Runtime: the lowered graph, with the K/V cache updated in place.

Float32 graphs run lowered (`gsx_engines/lowering/onnxruntime.py`), in two variants on the same memory: one for the
tokens of a single sequence, one for a single token of each of several neighbouring sequences. A call for a batch is
composed of these: a prompt runs in its own row of the K/V cache, a step in all rows that take one. The portable graph
runs instead for half precision, for FP8 (for which a CPU has no products), for batches under rank selection (which
chooses among all tokens of a call), and on versions of ONNX Runtime that lack the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from gsx_engines.bundle import tensor_names
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import rows_of
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering import onnxruntime as lowering
from gsx_engines.lowering.for_onnxruntime.decisions import KEPT
from gsx_engines.lowering.for_onnxruntime.probe import is_supported
from gsx_engines.lowering.for_onnxruntime.rotary import TABLE_PREFIX
from gsx_engines.lowering.for_onnxruntime.task import STATE, TOTAL_LENGTH, chooses_whole_calls
from gsx_engines.lowering.passes import not_as_expected
from gsx_engines.runners.base import Call, ExitState, Logits, StageOutput
from gsx_engines.runners.joining import in_time, joined_rows
from gsx_engines.runners.kept import KeptTable
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.session import open_session, session_config
from gsx_plugins.graph import LayoutError


class _Bound:
    """The arrays that a session's inputs and outputs are bound to: K/V buffers, inputs and results.

    Binding costs more than a small copy, so an array stays bound until a different shape is needed.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.binding = session.io_binding()
        self.arrays: dict[str, np.ndarray] = {}
        self._fed: dict[str, np.ndarray] = {}
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = {value.name for value in session.get_outputs()}

    def bind_cache(self, past: str, outputs: tuple[str, ...], array: np.ndarray) -> None:
        """Bind one buffer as an input and as every output that continues it."""
        self.arrays[past] = array
        self.binding.bind_input(past, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in outputs:
            if name in self._outputs:
                self._bind_output(name, array)

    def feed(self, name: str, value: np.ndarray) -> None:
        """Set an input for the next run."""
        bound = self.arrays.get(name)
        if bound is not None and bound.shape == value.shape:
            np.copyto(bound, value)
            return
        array = self.arrays[name] = np.array(value, order="C")
        self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def feed_if_read(self, name: str, value: np.ndarray) -> None:
        """Set an input that not every form of a graph has."""
        if name in self._inputs:
            self.feed(name, value)

    def feed_once(self, name: str, value: np.ndarray) -> None:
        """Set an input that seldom changes: nothing is copied as long as the array is the same object."""
        if self._fed.get(name) is not value:
            self.feed(name, value)
            self._fed[name] = value

    def feed_range(self, name: str, start: int, count: int) -> None:
        """Set an input [1, count] int64 to the numbers from `start` on."""
        bound = self.arrays.get(name)
        if count == 1 and bound is not None and bound.shape == (1, 1):
            bound[0, 0] = start
        else:
            self.feed(name, np.arange(start, start + count)[None])

    def feed_number(self, name: str, value: int) -> None:
        """Set an input [1] int64 to a number."""
        bound = self.arrays.get(name)
        if bound is None:
            self.feed(name, np.array([value]))
        else:
            bound[0] = value

    def result(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """The array into which the next run writes an output."""
        bound = self.arrays.get(name)
        if bound is None or bound.shape != shape:
            bound = self.arrays[name] = np.empty(shape, dtype)
            self._bind_output(name, bound)
        return bound

    def give_away(self, name: str) -> None:
        """Leave a result's array to the caller: a window's logits are too large to be copied."""
        del self.arrays[name]

    def run(self) -> None:
        """Run the session on the bound arrays."""
        self._session.run_with_iobinding(self.binding)

    def _bind_output(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


@dataclass(frozen=True)
class _Sessions:
    """The layers, the final norm with the head, and what computes the rotary tables, if the layers read them."""

    body: ort.InferenceSession
    head: ort.InferenceSession
    tables: ort.InferenceSession | None


@dataclass(frozen=True)
class _Rows:
    """Bindings for the rows of neighbouring sequences: the layers with their K/V, and the final norm with the head."""

    body: _Bound
    head: _Bound


@dataclass(frozen=True)
class _Memory:
    """K/V by input name, [B, K/V heads, capacity, D], and the bindings to parts of it, by (first row, rows).

    Args: tables: rotary tables by input name, [capacity, D/2]; empty if attention does not read them.
    """

    caches: dict[str, np.ndarray]
    tables: dict[str, np.ndarray]
    bound: dict[tuple[int, int], _Rows]


class OnnxRuntimeStage:
    """Runs a graph of a bundle on ONNX Runtime; see `Stage`.

    Args:
        bundle: an opened bundle.
        graph: `model`, `draft` or `verify`.
        threads: threads within an op; None for ONNX Runtime's own choice.
        shares_head: another stage of the same bundle, whose final norm and head this one uses as well.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: str = "model",
        *,
        threads: int | None = None,
        shares_head: OnnxRuntimeStage | None = None,
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.layers = bundle.manifest.layers_of(graph)
        self._bundle, self._graph, self._threads = bundle, graph, threads
        # The lowered graph outputs its final state anyway, and `exit_hidden` would be a copy of it.
        states = self.manifest.exit_state.items()
        self._exits = {name: axes for name, axes in states if name != tensor_names.EXIT_HIDDEN}
        self._table = KeptTable(bundle.manifest, self.layers)
        self._gated = len(self._table.places)
        self._ranks = bundle.manifest.selection is not None and bundle.manifest.selection.mode == "rank"
        self.counts_tokens = not self._ranks
        self._chooses_calls = chooses_whole_calls(bundle.manifest)
        self._shares_head = shares_head
        self._sequence: _Sessions | None = None
        self._steps: _Sessions | None = None
        self._portable: PortableStage | None = None

    def is_lowered(self, batch: int) -> bool:
        """Whether a batch of so many sequences runs the lowered graph; else it runs the portable one."""
        fp8 = self.manifest.quantization is not None and self.manifest.quantization.is_float8
        alone = self._ranks or self.manifest.hides_skipped
        lowered = self.manifest.precision == "fp32" and not fp8 and (batch == 1 or not alone)
        eight_bits = self.manifest.kv_cache is not None
        return lowered and is_supported(self.manifest.decoder.head_dim, eight_bits=eight_bits)

    def new_memory(self, batch: int, capacity: int) -> Any:
        """See `Stage`."""
        eight_bits = self.manifest.kv_cache is not None
        if not self.is_lowered(batch):
            if self._portable is None:
                self._portable = PortableStage(self._bundle, self._graph, threads=self._threads)
            return self._portable.new_memory(batch, capacity)
        opened = [self._sessions(steps=steps) for steps in (False, True)[: 1 + (batch > 1)]]  # so that no call waits
        shape = self.manifest.decoder
        size = (batch, shape.num_kv_heads, capacity, shape.head_dim)
        dtype = np.int8 if eight_bits else np.float32
        tables = {}
        if opened[0].tables is not None:
            computed = opened[0].tables
            found = computed.run(None, {tensor_names.POSITION_IDS: np.arange(capacity)[None]})
            names = [TABLE_PREFIX + output.name for output in computed.get_outputs()]
            tables = {name: table[0] for name, table in zip(names, found, strict=True)}
        return _Memory(
            {name: np.zeros(size, dtype) for name in tensor_names.past_of(shape.caches_of(self.layers))}, tables, {}
        )

    def run(self, memory: Any, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`."""
        if not isinstance(memory, _Memory):
            assert self._portable is not None
            return self._portable.run(memory, call, state, logits)
        if len(call.counts) == 1:
            return self._run_sequence(memory, 0, call, state, logits)
        parts = []
        for start, stop in _parts(call.counts):
            rows = slice(start, stop)
            part = Call(call.ids[rows], call.counts[rows], call.lengths[rows], rows_of(call.controls, rows))
            entering = {name: value[rows] for name, value in state.items()} if state is not None else None
            run = self._run_sequence if stop - start == 1 else self._run
            parts.append((rows, run(memory, start, part, entering, logits)))
        if len(parts) == 1 and parts[0][0] == slice(0, len(call.counts)):
            return parts[0][1]
        return joined_rows(parts, call, logits)

    def copy(self, memory: Any, source: int, target: int, length: int) -> None:
        """See `Stage`."""
        if not isinstance(memory, _Memory):
            assert self._portable is not None
            return self._portable.copy(memory, source, target, length)
        for cache in memory.caches.values():
            cache[target, :, :length] = cache[source, :, :length]
        return None

    def _run_sequence(
        self, memory: _Memory, row: int, call: Call, state: ExitState | None, logits: Logits
    ) -> StageOutput:
        """Run tokens of one sequence, in two calls if some of them run every branch and others do not: the lowered
        graph of a rule that chooses whole calls has one decision for all (`lowering.for_onnxruntime.whole_calls`)."""
        count, full = call.counts[0], 0
        if self._chooses_calls and "full_until" in call.controls:
            full = int(call.controls["full_until"][0]) - call.lengths[0]
        if not 0 < full < count:
            return self._run(memory, row, call, state, logits)
        outputs = []
        for columns in (slice(0, full), slice(full, count)):
            ids, before = call.ids[:, columns], call.lengths[0] + columns.start
            part = Call(ids, [ids.shape[1]], [before], call.controls)
            entering = None if state is None else {name: value[..., columns, :] for name, value in state.items()}
            outputs.append(
                self._run(memory, row, part, entering, logits if columns.start or logits == "all" else "none")
            )
        return in_time(*outputs)

    def _run(self, memory: _Memory, start: int, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """Run some tokens of one sequence, or one token of each of several; start: row of the first sequence."""
        shape = self.manifest.decoder
        batch, count = len(call.counts), call.counts[0]
        assert count, "a call without tokens"
        bound = self._bound(memory, start, batch)
        body = bound.body
        body.feed(tensor_names.INPUT_IDS, call.ids[:, :count])
        if batch == 1:
            body.feed_range(tensor_names.POSITION_IDS, call.lengths[0], count)
            body.feed_number(TOTAL_LENGTH, call.lengths[0] + count)
        else:
            lengths = np.array(call.lengths)
            body.feed(tensor_names.POSITION_IDS, lengths[:, None])
            body.feed(TOTAL_LENGTH, lengths + 1)
        for name, value in call.controls.items():
            body.feed_once(name, value)
        for name, value in (state or {}).items():
            body.feed(name, value[..., :count, :])
        hidden = body.result(STATE, (batch, count, shape.hidden_size), np.float32)
        kept = None
        if self._gated and self._ranks:
            kept = body.result(KEPT, (self._gated,), np.int64)
        elif self._gated:
            kept = body.result(KEPT, (self._gated * batch * count,), np.bool_)
        leaves = self.layers.stop < shape.num_layers
        sizes: dict[int | str, int] = {"batch": batch, "sequence": count}
        leaving = {
            name: body.result(name, tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes), np.float32)
            for name, axes in (self._exits.items() if leaves else ())
        }
        body.run()
        scores = np.zeros((batch, 0, shape.vocab_size), np.float32)
        if logits != "none":
            # The head takes rows without a batch axis: [1, any, H].
            wanted = (hidden if logits == "all" or count == 1 else hidden[:, -1:]).reshape(1, -1, shape.hidden_size)
            bound.head.feed(STATE, wanted)
            found = bound.head.result(tensor_names.LOGITS, (1, wanted.shape[1], shape.vocab_size), np.float32)
            bound.head.run()
            scores = found.reshape(batch, -1, shape.vocab_size)
            if wanted.shape[1] > batch:
                bound.head.give_away(tensor_names.LOGITS)
            else:
                scores = scores.copy()
        passed = {tensor_names.EXIT_HIDDEN: hidden, **leaving} if leaves else {}
        state = {name: value.copy() for name, value in passed.items()} or None
        if kept is not None and self._ranks:
            return StageOutput(scores, state, self._table.of(kept), self._table.of_each(kept[:, None]))
        rows = np.zeros(0, np.bool_) if kept is None else kept
        return StageOutput(scores, state, *self._table.counts(rows.reshape(self._gated, batch, count)))

    def _bound(self, memory: _Memory, start: int, rows: int) -> _Rows:
        """The bindings for neighbouring rows of the memory."""
        bound = memory.bound.get((start, rows))
        if bound is None:
            sessions = self._sessions(steps=rows > 1)
            bound = _Rows(_Bound(sessions.body), _Bound(sessions.head))
            for name, cache in memory.caches.items():
                outputs = lowering.cache_outputs(self.manifest, *tensor_names.cache_and_kind(name))
                bound.body.bind_cache(name, outputs, cache[start : start + rows])
            for name, table in memory.tables.items():
                bound.body.feed_if_read(name, table)
            memory.bound[start, rows] = bound
        return bound

    def _sessions(self, *, steps: bool) -> _Sessions:
        """One variant of the graph, lowered and loaded on first use."""
        made = self._steps if steps else self._sequence
        if made is not None:
            return made
        path = self._bundle.graph_path(self._graph)
        portable = onnx.load(str(path), load_external_data=False)
        try:
            lowered = lowering.lower(portable, self.manifest, self.layers, steps=steps)
        except LayoutError as error:
            raise not_as_expected(path, self.manifest, error) from error
        if steps:
            sequence = self._sessions(steps=False)
            self._steps = _Sessions(self._open(lowered.body), sequence.head, sequence.tables)
            return self._steps
        shared = self._shares_head
        head = shared._sessions(steps=False).head if shared else self._open(lowered.head, layers=False)
        tables = None if lowered.tables is None else self._open(lowered.tables, layers=False)
        self._sequence = _Sessions(self._open(lowered.body), head, tables)
        return self._sequence

    def _open(self, model: onnx.ModelProto, *, layers: bool = True) -> ort.InferenceSession:
        config = session_config(self.manifest, lowered=True, layers=layers)
        return open_session(model.SerializeToString(), self._bundle.directory, self._threads, config)


def _parts(counts: list[int]) -> list[tuple[int, int]]:
    """Rows of a call that run together, as (start, stop): neighbours with one token each; any other row by itself."""
    parts: list[tuple[int, int]] = []
    for row, count in enumerate(counts):
        if count == 1 and parts and parts[-1][1] == row and counts[row - 1] == 1:
            parts[-1] = (parts[-1][0], row + 1)
        elif count:
            parts.append((row, row + 1))
    return parts
