"""Which runner executes a bundle on this machine."""

from __future__ import annotations

from typing import Literal

from engines.bundle.bundle import Bundle
from engines.runners.base import Runner
from engines.runners.onnxruntime import OnnxRuntimeStage
from engines.runners.split import SplitRunner
from engines.runners.tensorrt import open_stage
from engines.runners.whole import WholeRunner

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]


def open_runner(bundle: Bundle, threads: int | None = None, backend: Backend = "onnxruntime") -> Runner:
    """The fastest runner for a bundle on a runtime.

    Args:
        threads: of ONNX Runtime within an op; None for its own choice.
        backend: the TensorRT backends run the engines that `gsx build` made.
    Raises:
        EngineError: TensorRT was asked for, and its engines or a GPU are missing.
    """
    if backend == "onnxruntime":
        return WholeRunner(OnnxRuntimeStage(bundle, threads=threads))
    return WholeRunner(open_stage(bundle, backend))


def open_split_runner(bundle: Bundle, threads: int | None = None, backend: Backend = "onnxruntime") -> SplitRunner:
    """The fastest runner for the two halves of a bundle that is split at an exit; arguments as of `open_runner`.

    Raises:
        BundleError: the bundle has no such graphs.
        EngineError: as `open_runner`.
    """
    if backend != "onnxruntime":
        return SplitRunner(open_stage(bundle, backend, "draft"), open_stage(bundle, backend, "verify"))
    late = OnnxRuntimeStage(bundle, "verify", threads=threads)
    return SplitRunner(OnnxRuntimeStage(bundle, "draft", threads=threads, shares_head=late), late)
