"""ONNX Runtime at its best: the lowered graph, with the K/V cache in place.

Float32 runs lowered (`gsx_engines/lowering/onnxruntime.py`): tokens of one sequence in one form, one token of each of
several neighbouring sequences in another, on the same memory. A call of a batch is made of these: a prompt goes to its
own row of the K/V, a step to all rows that take one. Half precision, FP8 (which a CPU has no products for), batches
under rank selection (which chooses among a whole call), and versions of ONNX Runtime without the kernels run the
portable graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import rows_of
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering import onnxruntime as lowering
from gsx_engines.lowering.for_onnxruntime.decisions import KEPT
from gsx_engines.lowering.for_onnxruntime.task import STATE, TOTAL_LENGTH
from gsx_engines.lowering.passes import not_as_expected
from gsx_engines.lowering.probe import is_supported
from gsx_engines.runners.base import Call, ExitState, Logits, StageOutput, exit_names
from gsx_engines.runners.portable import (
    KeptTable,
    PortableStage,
    layers_of,
    open_session,
    session_config,
    skippable_places,
)
from gsx_plugins.graph import LayoutError


class _Bound:
    """Arrays that a session's inputs and outputs are bound to: K/V buffers, feeds and results.

    Binding costs more than a small copy, so an array stays bound until another shape is needed.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.binding = session.io_binding()
        self.arrays: dict[str, np.ndarray] = {}
        self._fed: dict[str, np.ndarray] = {}

    def bind_cache(self, past: str, outputs: tuple[str, ...], array: np.ndarray) -> None:
        """One buffer as input and as every output that continues it."""
        self.arrays[past] = array
        self.binding.bind_input(past, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in outputs:
            self._bind_output(name, array)

    def feed(self, name: str, value: np.ndarray) -> None:
        """Give an input its value for the next run."""
        bound = self.arrays.get(name)
        if bound is not None and bound.shape == value.shape:
            np.copyto(bound, value)
            return
        array = self.arrays[name] = np.array(value, order="C")
        self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def feed_once(self, name: str, value: np.ndarray) -> None:
        """The same for a value that seldom changes: nothing is copied as long as it is the same array."""
        if self._fed.get(name) is not value:
            self.feed(name, value)
            self._fed[name] = value

    def feed_range(self, name: str, start: int, count: int) -> None:
        """Give an input [1, count] int64 the numbers from start on."""
        bound = self.arrays.get(name)
        if count == 1 and bound is not None and bound.shape == (1, 1):
            bound[0, 0] = start
        else:
            self.feed(name, np.arange(start, start + count)[None])

    def feed_number(self, name: str, value: int) -> None:
        """Give an input [1] int64 a number."""
        bound = self.arrays.get(name)
        if bound is None:
            self.feed(name, np.array([value]))
        else:
            bound[0] = value

    def result(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """The array that the next run writes an output to."""
        bound = self.arrays.get(name)
        if bound is None or bound.shape != shape:
            bound = self.arrays[name] = np.empty(shape, dtype)
            self._bind_output(name, bound)
        return bound

    def run(self) -> None:
        """Run the session on what is bound."""
        self._session.run_with_iobinding(self.binding)

    def _bind_output(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


@dataclass(frozen=True)
class _Sessions:
    """The layers, and final norm and head."""

    body: ort.InferenceSession
    head: ort.InferenceSession


@dataclass(frozen=True)
class _Rows:
    """What the rows of neighbouring sequences are bound to: the layers with their K/V, and final norm and head."""

    body: _Bound
    head: _Bound


@dataclass(frozen=True)
class _Memory:
    """K/V by input name, [B, kv heads, capacity, D], and what is bound to parts of it, by (first row, rows)."""

    caches: dict[str, np.ndarray]
    bound: dict[tuple[int, int], _Rows]


class OnnxRuntimeStage:
    """Runs a graph of a bundle on ONNX Runtime; see `Stage`.

    Args:
        bundle: an opened bundle.
        graph: `model`, `draft` or `verify`.
        threads: of ONNX Runtime within an op; None for its own choice.
        shares_head: another stage of the same bundle, whose final norm and head this one then uses.
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
        self.layers = layers_of(bundle.manifest, graph)
        self._bundle, self._graph, self._threads = bundle, graph, threads
        places = skippable_places(bundle.manifest, self.layers)
        self._gated = len(places)
        # The lowered graph gives its state, of which `exit_hidden` is a copy.
        self._exits = {name: axes for name, axes in exit_names(self.manifest).items() if name != "exit_hidden"}
        self._table = KeptTable(bundle.manifest, places)
        self._shares_head = shares_head
        self._sequence: _Sessions | None = None
        self._steps: _Sessions | None = None
        self._portable: PortableStage | None = None

    def new_memory(self, batch: int, capacity: int) -> Any:
        """See `Stage`."""
        fp8 = self.manifest.quantization is not None and self.manifest.quantization.scheme == "fp8"
        ranks = self.manifest.selection is not None and self.manifest.selection.mode == "rank"
        alone = ranks or self.manifest.hides_skipped
        lowered = self.manifest.precision == "fp32" and not fp8 and (batch == 1 or not alone)
        eight_bits = self.manifest.kv_cache is not None
        if not (lowered and is_supported(self.manifest.decoder.head_dim, eight_bits=eight_bits)):
            if self._portable is None:
                self._portable = PortableStage(self._bundle, self._graph, threads=self._threads)
            return self._portable.new_memory(batch, capacity)
        for steps in (False, True)[: 1 + (batch > 1)]:
            self._sessions(steps=steps)  # now, so that no call waits for it
        shape = self.manifest.decoder
        size = (batch, shape.num_kv_heads, capacity, shape.head_dim)
        names = [f"past_key_values.{layer}.{kv}" for layer in self.layers for kv in ("key", "value")]
        return _Memory({name: np.zeros(size, np.int8 if eight_bits else np.float32) for name in names}, {})

    def run(self, memory: Any, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`."""
        if not isinstance(memory, _Memory):
            assert self._portable is not None
            return self._portable.run(memory, call, state, logits)
        if len(call.counts) == 1:
            return self._run(memory, 0, call, state, logits)
        parts = []
        for start, stop in _parts(call.counts):
            rows = slice(start, stop)
            part = Call(call.ids[rows], call.counts[rows], call.lengths[rows], rows_of(call.controls, rows))
            entering = {name: value[rows] for name, value in state.items()} if state is not None else None
            parts.append((rows, self._run(memory, start, part, entering, logits)))
        if len(parts) == 1 and parts[0][0] == slice(0, len(call.counts)):
            return parts[0][1]
        return _joined(parts, call, logits)

    def move(self, memory: Any, source: int, target: int, length: int) -> None:
        """See `Stage`."""
        if not isinstance(memory, _Memory):
            assert self._portable is not None
            return self._portable.move(memory, source, target, length)
        for cache in memory.caches.values():
            cache[target, :, :length] = cache[source, :, :length]
        return None

    def _run(self, memory: _Memory, start: int, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """Some tokens of one sequence, or one of each of several; start: the row of the first sequence."""
        shape = self.manifest.decoder
        batch, count = len(call.counts), call.counts[0]
        assert count, "a call has tokens"
        bound = self._bound(memory, start, batch)
        body = bound.body
        body.feed("input_ids", call.ids[:, :count])
        if batch == 1:
            body.feed_range("position_ids", call.lengths[0], count)
            body.feed_number(TOTAL_LENGTH, call.lengths[0] + count)
        else:
            lengths = np.array(call.lengths)
            body.feed("position_ids", lengths[:, None])
            body.feed(TOTAL_LENGTH, lengths + 1)
        for name, value in call.controls.items():
            body.feed_once(name, value)
        for name, value in (state or {}).items():
            body.feed(name, value[..., :count, :])
        hidden = body.result(STATE, (batch, count, shape.hidden_size), np.float32)
        kept = None
        if self._gated and batch == 1:
            kept = body.result(KEPT, (self._gated,), np.int64)
        elif self._gated:
            kept = body.result(KEPT, (self._gated * batch,), np.bool_)
        leaves = self.layers.stop < shape.num_layers
        sizes: dict[int | str, int] = {"batch": batch, "sequence": count}
        leaving = {
            name: body.result(name, tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes), np.float32)
            for name, axes in (self._exits.items() if leaves else ())
        }
        body.run()
        scores = np.zeros((batch, 0, shape.vocab_size), np.float32)
        if logits != "none":
            # The head knows rows alone: [1, any, H].
            wanted = (hidden if logits == "all" or count == 1 else hidden[:, -1:]).reshape(1, -1, shape.hidden_size)
            bound.head.feed(STATE, wanted)
            found = bound.head.result("logits", (1, wanted.shape[1], shape.vocab_size), np.float32)
            bound.head.run()
            scores = found.reshape(batch, -1, shape.vocab_size).copy()
        passed = {"exit_hidden": hidden, **leaving} if leaves else {}
        state = {name: value.copy() for name, value in passed.items()} or None
        if kept is None:
            return StageOutput(scores, state, self._table.of(None))
        table = kept.reshape(self._gated, batch)
        return StageOutput(scores, state, self._table.of(table.sum(axis=1)), table.sum(axis=0))

    def _bound(self, memory: _Memory, start: int, rows: int) -> _Rows:
        """What neighbouring rows of the memory are bound to."""
        bound = memory.bound.get((start, rows))
        if bound is None:
            sessions = self._sessions(steps=rows > 1)
            bound = _Rows(_Bound(sessions.body), _Bound(sessions.head))
            for name, cache in memory.caches.items():
                layer, kv = name.split(".")[1:]
                outputs = lowering.cache_outputs(self.manifest, int(layer), kv)
                bound.body.bind_cache(name, outputs, cache[start : start + rows])
            memory.bound[start, rows] = bound
        return bound

    def _sessions(self, *, steps: bool) -> _Sessions:
        """A form of the graph, lowered and loaded once."""
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
            self._steps = _Sessions(self._open(lowered.body), self._sessions(steps=False).head)
            return self._steps
        shared = self._shares_head
        head = shared._sessions(steps=False).head if shared else self._open(lowered.head)
        self._sequence = _Sessions(self._open(lowered.body), head)
        return self._sequence

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        config = session_config(self.manifest)
        return open_session(model.SerializeToString(), self._bundle.directory, self._threads, config)


def _parts(counts: list[int]) -> list[tuple[int, int]]:
    """Rows of a call that run together, as (first, behind the last): neighbours with one token, others alone."""
    parts: list[tuple[int, int]] = []
    for row, count in enumerate(counts):
        if count == 1 and parts and parts[-1][1] == row and counts[row - 1] == 1:
            parts[-1] = (parts[-1][0], row + 1)
        elif count:
            parts.append((row, row + 1))
    return parts


def _joined(parts: list[tuple[slice, StageOutput]], call: Call, logits: Logits) -> StageOutput:
    """One output of calls on parts of a batch; what no part gives is zero."""
    batch, length = call.ids.shape
    columns = {"none": 0, "last": 1, "all": length}[logits]
    first = parts[0][1]

    def whole(arrays: list[np.ndarray], columns: int) -> np.ndarray:
        """Arrays whose last axis but one is the tokens, at their sequences' rows."""
        tail = arrays[0].shape
        out = np.zeros((batch, *tail[1:-2], columns, tail[-1]), arrays[0].dtype)
        for (rows, _), array in zip(parts, arrays, strict=True):
            out[rows, ..., : array.shape[-2], :] = array
        return out

    states = [output.state for _, output in parts if output.state is not None]
    leaving = {name: whole([state[name] for state in states], length) for name in first.state or ()}
    kept = [output.kept for _, output in parts if output.kept is not None]
    kept_by_sequence = None
    if first.kept_by_sequence is not None:
        kept_by_sequence = np.zeros(batch, np.int64)
        for rows, output in parts:
            assert output.kept_by_sequence is not None
            kept_by_sequence[rows] = output.kept_by_sequence
    return StageOutput(
        logits=whole([output.logits for _, output in parts], columns),
        state=leaving or None,
        kept=np.sum(kept, axis=0) if kept else None,
        kept_by_sequence=kept_by_sequence,
    )
