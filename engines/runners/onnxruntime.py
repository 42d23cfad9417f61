"""ONNX Runtime at its best: the lowered graph, with the K/V cache in place.

One sequence without padding runs lowered (`engines/lowering/onnxruntime.py`). Batches, half precision, and versions
of ONNX Runtime without the kernels run the portable graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from engines.bundle.bundle import Bundle
from engines.bundle.manifest import Manifest
from engines.lowering import onnxruntime as lowering
from engines.runners.base import Cache, Logits, StepOutput
from engines.runners.portable import PortableRunner, gated_places, open_session


@dataclass
class _Memory:
    """Arrays that a session's inputs and outputs are bound to: K/V buffers of one sequence, and results."""

    binding: ort.IOBinding
    buffers: dict[str, np.ndarray]


class OnnxRuntimeRunner:
    """Runs a bundle on ONNX Runtime; see `Runner` for the interface.

    Args:
        bundle: an opened bundle.
        threads: of ONNX Runtime within an op; None for its own choice.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.manifest: Manifest = bundle.manifest
        self._bundle, self._threads = bundle, threads
        self._places = [
            (layer, ("attn", "mlp").index(branch)) for layer, branch in gated_places(bundle.manifest)
        ]
        self._lowered: ort.InferenceSession | None = None
        self._portable: PortableRunner | None = None

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        lowered = batch == 1 and self.manifest.precision == "fp32"
        if not (lowered and lowering.is_supported(self.manifest.decoder.head_dim)):
            if self._portable is None:
                self._portable = PortableRunner(self._bundle, threads=self._threads)
            return self._portable.new_cache(batch, capacity)
        session = self._lowered_session()
        shape = self.manifest.decoder
        size = (1, shape.num_kv_heads, capacity, shape.head_dim)
        memory = _Memory(session.io_binding(), {})
        for layer in range(shape.num_layers):
            for kv in ("key", "value"):
                buffer = memory.buffers[f"{layer}.{kv}"] = np.zeros(size, np.float32)
                past = f"past_key_values.{layer}.{kv}"
                memory.binding.bind_input(past, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
                for name in (lowering.appended_name(layer, kv), f"present.{layer}.{kv}"):
                    _bind_output(memory.binding, name, buffer)
        if self._places:
            kept = memory.buffers[lowering.KEPT] = np.zeros(len(self._places), np.int64)
            _bind_output(memory.binding, lowering.KEPT, kept)
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
        length = input_ids.shape[1]
        total = cache.length + length
        if total > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} columns, {total} are needed")
        if not attention_mask.all():
            raise ValueError("a single sequence must not be padded")
        session, binding = self._lowered_session(), cache.memory.binding
        feeds: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            lowering.WRITE_AT: np.array([cache.length], np.int64),
            lowering.LAST_COLUMN: np.array([total - 1], np.int32),
            lowering.TOTAL: np.array(total, np.int32),
            lowering.LOGITS_FROM: np.array([0 if logits == "all" else length - 1], np.int64),
        }
        if select is not None and self.manifest.selection is not None:
            feeds["thresholds" if self.manifest.selection.mode == "threshold" else "budget"] = select
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        scores = np.empty((1, length if logits == "all" else 1, self.manifest.decoder.vocab_size), np.float32)
        _bind_output(binding, "logits", scores)
        session.run_with_iobinding(binding)
        cache.length = total
        kept = None
        if self._places:
            kept = np.zeros((self.manifest.decoder.num_layers, 2), np.int64)
            kept[tuple(zip(*self._places, strict=True))] = cache.memory.buffers[lowering.KEPT]
        return StepOutput(scores, kept)

    def _lowered_session(self) -> ort.InferenceSession:
        if self._lowered is None:
            portable = onnx.load(str(self._bundle.graph_path("model")), load_external_data=False)
            model = lowering.lower(portable, self.manifest)
            self._lowered = open_session(model.SerializeToString(), self._bundle.directory, self._threads)
        return self._lowered


def _bind_output(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
