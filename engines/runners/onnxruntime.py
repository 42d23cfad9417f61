"""ONNX Runtime at its best: the lowered graph, with the K/V cache in place.

One sequence without padding runs lowered (`engines/lowering/onnxruntime.py`). Batches, half precision, FP8 (which a CPU
has no products for), and versions of ONNX Runtime without the kernels run the portable graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from engines.bundle.bundle import Bundle
from engines.bundle.manifest import Manifest
from engines.errors import BundleError
from engines.lowering import onnxruntime as lowering
from engines.lowering.probe import is_supported
from engines.runners.base import Call, ExitState, Logits, StageOutput, exit_names
from engines.runners.portable import (
    KeptTable,
    PortableStage,
    layers_of,
    open_session,
    session_config,
    skippable_places,
)


class _Bound:
    """Arrays that a session's inputs and outputs are bound to: K/V buffers of one sequence, feeds and results.

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
class _Memory:
    """What one sequence is bound to: the layers with their K/V, and final norm and head."""

    body: _Bound
    head: _Bound


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
        self._no_logits = np.zeros((1, 0, bundle.manifest.decoder.vocab_size), np.float32)
        self._body: ort.InferenceSession | None = None
        self._head: ort.InferenceSession | None = None
        self._portable: PortableStage | None = None

    def new_memory(self, batch: int, capacity: int) -> Any:
        """See `Stage`: one sequence in float32 runs lowered, with its K/V in place."""
        fp8 = self.manifest.quantization is not None and self.manifest.quantization.scheme == "fp8"
        lowered = batch == 1 and self.manifest.precision == "fp32" and not fp8
        if not (lowered and is_supported(self.manifest.decoder.head_dim)):
            if self._portable is None:
                self._portable = PortableStage(self._bundle, self._graph, threads=self._threads)
            return self._portable.new_memory(batch, capacity)
        body, head = self._sessions()
        shape = self.manifest.decoder
        size = (1, shape.num_kv_heads, capacity, shape.head_dim)
        memory = _Memory(_Bound(body), _Bound(head))
        for layer in self.layers:
            for kv in ("key", "value"):
                outputs = lowering.cache_outputs(self.manifest, layer, kv)
                memory.body.bind_cache(f"past_key_values.{layer}.{kv}", outputs, np.zeros(size, np.float32))
        return memory

    def run(self, memory: Any, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`."""
        if not isinstance(memory, _Memory):
            assert self._portable is not None
            return self._portable.run(memory, call, state, logits)
        shape = self.manifest.decoder
        count, past = call.counts[0], call.lengths[0]
        assert count, "a call of one sequence has tokens"
        body = memory.body
        body.feed("input_ids", call.ids[:, :count])
        body.feed_range("position_ids", past, count)
        body.feed_number(lowering.TOTAL_LENGTH, past + count)
        for name, value in call.controls.items():
            body.feed_once(name, value)
        for name, value in (state or {}).items():
            body.feed(name, value)
        hidden = body.result(lowering.STATE, (1, count, shape.hidden_size), np.float32)
        counts = body.result(lowering.KEPT, (self._gated,), np.int64) if self._gated else None
        leaves = self.layers.stop < shape.num_layers
        sizes: dict[int | str, int] = {"batch": 1, "sequence": count}
        leaving = {
            name: body.result(name, tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes), np.float32)
            for name, axes in (self._exits.items() if leaves else ())
        }
        body.run()
        scores = self._no_logits
        if logits != "none":
            wanted = hidden if logits == "all" or count == 1 else hidden[:, -1:]
            memory.head.feed(lowering.STATE, wanted)
            scores = memory.head.result("logits", (1, wanted.shape[1], shape.vocab_size), np.float32)
            memory.head.run()
        passed = {"exit_hidden": hidden, **leaving} if leaves else {}
        state = {name: value.copy() for name, value in passed.items()} or None
        return StageOutput(scores.copy(), state, self._table.of(counts))

    def _sessions(self) -> tuple[ort.InferenceSession, ort.InferenceSession]:
        """The layers, and final norm and head: lowered and loaded once."""
        if self._body is None or self._head is None:
            path = self._bundle.graph_path(self._graph)
            portable = onnx.load(str(path), load_external_data=False)
            try:
                lowered = lowering.lower(portable, self.manifest, self.layers)
            except (AssertionError, IndexError, KeyError, StopIteration) as error:
                raise BundleError(
                    f"{path}: is not laid out as this version of gsx lays graphs out",
                    expected=f"a graph of gsx {version('gsx')}",
                    found=f"one of gsx {self.manifest.gsx_version}",
                    todo="run `gsx export` again",
                ) from error
            self._body = self._open(lowered.body)
            self._head = self._shares_head._sessions()[1] if self._shares_head else self._open(lowered.head)
        return self._body, self._head

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        config = session_config(self.manifest)
        return open_session(model.SerializeToString(), self._bundle.directory, self._threads, config)
