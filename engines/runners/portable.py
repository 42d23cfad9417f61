"""The file as anybody's ONNX Runtime runs it: past in, present out, nothing lowered.

Parity is measured on this runner, since it executes `model.onnx` unchanged; on request it also gives values from
inside the graph. It copies the K/V cache at every call: `onnxruntime.py` is the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from engines.bundle.bundle import Bundle
from engines.bundle.manifest import Manifest
from engines.errors import BundleError, GsxError
from engines.runners.base import Cache, Logits, StepOutput

NUMPY_TYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class PortableRunner:
    """Runs `model.onnx` as it is.

    Args:
        bundle: an opened bundle.
        capture: names of values inside the graph to keep of every call (`captured`).
        threads: of ONNX Runtime within an op; None for its own choice.
    Raises:
        GsxError: a precision that ONNX Runtime has no CPU kernels for.
        BundleError: ONNX Runtime does not load the graph.
    """

    def __init__(self, bundle: Bundle, *, capture: Sequence[str] = (), threads: int | None = None) -> None:
        self.manifest: Manifest = bundle.manifest
        self.dtype = host_type(self.manifest)
        self.captured: dict[str, np.ndarray] = {}
        self._capture = list(capture)
        model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
        kept = [f"layers.{layer}.{branch}.count" for layer, branch in gated_places(self.manifest)]
        for name in dict.fromkeys([*kept, *capture]):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        self._kept = kept
        self._session = open_session(model.SerializeToString(), bundle.directory, threads)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        shape = self.manifest.decoder
        empty = np.zeros((batch, shape.num_kv_heads, 0, shape.head_dim), self.dtype)
        memory = {f"{i}.{kv}": empty for i in range(shape.num_layers) for kv in ("key", "value")}
        return Cache(batch, capacity, 0, memory)

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        select: np.ndarray | None,
        logits: Logits = "last",
    ) -> StepOutput:
        """See `Runner`."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if select is not None and self.manifest.selection is not None:
            feeds["thresholds" if self.manifest.selection.mode == "threshold" else "budget"] = select
        for name, value in cache.memory.items():
            feeds[f"past_key_values.{name}"] = value[:, :, : cache.length]
        presents = [f"present.{name}" for name in cache.memory]
        names = ["logits", *presents, *self._kept, *self._capture]
        results = dict(zip(names, self._session.run(names, feeds), strict=True))
        cache.memory = {name: results[f"present.{name}"] for name in cache.memory}
        cache.length += input_ids.shape[1]
        self.captured = {name: results[name] for name in self._capture}
        kept = None
        if self._kept:
            kept = np.zeros((self.manifest.decoder.num_layers, 2), np.int64)
            for (layer, branch), name in zip(gated_places(self.manifest), self._kept, strict=True):
                kept[layer, ("attn", "mlp").index(branch)] = results[name]
        scores = results["logits"].astype(np.float32, copy=False)
        return StepOutput(scores if logits == "all" else scores[:, -1:], kept)


def gated_places(manifest: Manifest) -> list[tuple[int, str]]:
    """(layer, branch) of every gated branch, in order."""
    branches = manifest.gates.branches if manifest.gates else ()
    return [(layer, branch) for layer in range(manifest.decoder.num_layers) for branch in branches]


def host_type(manifest: Manifest) -> np.dtype[Any]:
    """NumPy type of the graph's activations.

    Raises:
        GsxError: bfloat16, which ONNX Runtime has no CPU kernels for.
    """
    dtype = NUMPY_TYPES.get(manifest.precision)
    if dtype is None:
        raise GsxError(
            f"ONNX Runtime cannot run {manifest.precision} graphs on a CPU (no MatMul kernel)",
            expected="fp32 or fp16",
            found=manifest.precision,
            todo="export with --precision fp32 to run here; the bf16 graph is for TensorRT",
        )
    return dtype


def open_session(model: bytes, directory: Path, threads: int | None) -> ort.InferenceSession:
    """An ONNX Runtime session of a model whose external data lies in a directory.

    Raises:
        BundleError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about our run-time defaults, which are wanted
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise many kinds, all about this model
        raise BundleError(
            f"bundle {directory}: ONNX Runtime {ort.__version__} does not load the graph",
            found=str(error).strip().splitlines()[0],
            todo="gsx doctor says what works on this machine",
        ) from error
