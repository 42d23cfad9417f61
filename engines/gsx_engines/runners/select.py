"""Choosing the runner that executes a bundle on this machine."""

from __future__ import annotations

from typing import Literal, Protocol

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.runners.base import Runner, Stage
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.tensorrt import open_stage
from gsx_engines.runners.whole import WholeRunner


class Runtime(Protocol):
    """A runtime from a floor above this one (PyTorch: `gsx/torch_runtime.py`)."""

    def stage(self, bundle: Bundle, graph: str) -> Stage:
        """Open a graph of a bundle, ready to run."""
        ...


Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"] | Runtime


def open_runner(bundle: Bundle, threads: int | None = None, backend: Backend = "onnxruntime") -> Runner:
    """Open the fastest runner for a bundle on a runtime.

    Args:
        threads: threads within an op; None for ONNX Runtime's own choice.
        backend: the TensorRT backends run the engines that `gsx build` made.
    Raises:
        EngineError: a TensorRT backend without its engines or without a GPU.
    """
    return WholeRunner(_stage(bundle, "model", threads, backend))


def open_split_runner(bundle: Bundle, threads: int | None = None, backend: Backend = "onnxruntime") -> SplitRunner:
    """Open the fastest runner for the two halves of a bundle that is split at an exit; arguments as in `open_runner`.

    Raises:
        BundleError: the bundle has no such graphs.
        EngineError: as in `open_runner`.
    """
    if not isinstance(backend, str):
        return SplitRunner(backend.stage(bundle, "draft"), backend.stage(bundle, "verify"))
    if backend != "onnxruntime":
        early = open_stage(bundle, backend, "draft")
        return SplitRunner(early, open_stage(bundle, backend, "verify", beside=early))
    late, draft = OnnxRuntimeStage(bundle, "verify", threads=threads), bundle.manifest.draft
    own_head = draft is not None and draft.vocabulary is not None
    return SplitRunner(OnnxRuntimeStage(bundle, "draft", threads=threads, shares_head=None if own_head else late), late)


def _stage(bundle: Bundle, graph: str, threads: int | None, backend: Backend) -> Stage:
    if backend == "onnxruntime":
        return OnnxRuntimeStage(bundle, graph, threads=threads)
    return open_stage(bundle, backend, graph) if isinstance(backend, str) else backend.stage(bundle, graph)
