"""ONNX Runtime at its best: the lowered graph, with the K/V cache in place.

One sequence without padding runs lowered (`engines/lowering/onnxruntime.py`). Batches, half precision, and versions
of ONNX Runtime without the kernels run the portable graph.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime as ort

from engines.bundle.bundle import Bundle
from engines.bundle.manifest import Manifest
from engines.errors import BundleError
from engines.lowering import onnxruntime as lowering
from engines.lowering.probe import is_supported
from engines.runners.base import Cache, Logits, StepOutput
from engines.runners.portable import PortableRunner, gated_places, open_session


class _Memory:
    """Arrays that a session's inputs and outputs are bound to: K/V buffers of one sequence, feeds and results.

    Binding costs more than a small copy, so an array stays bound until another shape is needed.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self.binding = session.io_binding()
        self.arrays: dict[str, np.ndarray] = {}

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

    def feed_number(self, name: str, value: int) -> None:
        """The same for an input of one int64."""
        if name in self.arrays:
            self.arrays[name][0] = value
        else:
            self.feed(name, np.array([value], np.int64))

    def result(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """The array that the next run writes an output to."""
        bound = self.arrays.get(name)
        if bound is None or bound.shape != shape:
            bound = self.arrays[name] = np.empty(shape, dtype)
            self._bind_output(name, bound)
        return bound

    def _bind_output(self, name: str, array: np.ndarray) -> None:
        self.binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class OnnxRuntimeRunner:
    """Runs a bundle on ONNX Runtime; see `Runner` for the interface.

    Args:
        bundle: an opened bundle.
        threads: of ONNX Runtime within an op; None for its own choice.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.manifest: Manifest = bundle.manifest
        self._bundle, self._threads = bundle, threads
        places = [(layer, ("attn", "mlp").index(branch)) for layer, branch in gated_places(bundle.manifest)]
        self._rows, self._columns = np.array(places, np.int64).reshape(-1, 2).T
        self._lowered: ort.InferenceSession | None = None
        self._portable: PortableRunner | None = None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        lowered = batch == 1 and self.manifest.precision == "fp32"
        if not (lowered and is_supported(self.manifest.decoder.head_dim)):
            if self._portable is None:
                self._portable = PortableRunner(self._bundle, threads=self._threads)
            return self._portable.new_cache(batch, capacity)
        session = self._lowered_session()
        shape = self.manifest.decoder
        size = (1, shape.num_kv_heads, capacity, shape.head_dim)
        memory = _Memory(session)
        for layer in range(shape.num_layers):
            for kv in ("key", "value"):
                outputs = lowering.cache_outputs(self.manifest, layer, kv)
                memory.bind_cache(f"past_key_values.{layer}.{kv}", outputs, np.zeros(size, np.float32))
        return Cache(1, capacity, 0, memory)

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        select: np.ndarray | None,
        logits: Logits = "last",
    ) -> StepOutput:
        """See `Runner`. Padding in a batch of one is refused: there is never a need for it."""
        if not isinstance(cache.memory, _Memory):
            assert self._portable is not None
            return self._portable.step(cache, input_ids, attention_mask, position_ids, select, logits)
        memory, length = cache.memory, input_ids.shape[1]
        total = cache.length + length
        if total > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} columns, {total} are needed")
        if length > 1 and not attention_mask.all():
            raise ValueError("a single sequence must not be padded")
        memory.feed("input_ids", input_ids)
        memory.feed("position_ids", position_ids)
        memory.feed_number(lowering.TOTAL_LENGTH, total)
        memory.feed_number(lowering.LOGITS_FROM, 0 if logits == "all" else length - 1)
        if select is not None and self.manifest.selection is not None:
            memory.feed("thresholds" if self.manifest.selection.mode == "threshold" else "budget", select)
        columns = length if logits == "all" else 1
        scores = memory.result("logits", (1, columns, self.manifest.decoder.vocab_size), np.float32)
        counts = memory.result(lowering.KEPT, (len(self._rows),), np.int64) if len(self._rows) else None
        self._lowered_session().run_with_iobinding(memory.binding)
        cache.length = total
        kept = None
        if counts is not None:
            kept = np.zeros((self.manifest.decoder.num_layers, 2), np.int64)
            kept[self._rows, self._columns] = counts
        return StepOutput(scores.copy(), kept)

    def _lowered_session(self) -> ort.InferenceSession:
        if self._lowered is None:
            path = self._bundle.graph_path("model")
            portable = onnx.load(str(path), load_external_data=False)
            try:
                model = lowering.lower(portable, self.manifest)
            except (AssertionError, IndexError, KeyError, StopIteration) as error:
                raise BundleError(
                    f"{path}: is not laid out as this version of gsx lays graphs out",
                    expected=f"a graph of gsx {version('gsx')}",
                    found=f"one of gsx {self.manifest.gsx_version}",
                    todo="run `gsx export` again",
                ) from error
            self._lowered = open_session(model.SerializeToString(), self._bundle.directory, self._threads)
        return self._lowered
