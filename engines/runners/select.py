"""Which runner executes a bundle on this machine."""

from __future__ import annotations

from engines.bundle.bundle import Bundle
from engines.runners.base import Runner
from engines.runners.onnxruntime import OnnxRuntimeStage
from engines.runners.split import SplitRunner
from engines.runners.whole import WholeRunner


def open_runner(bundle: Bundle, threads: int | None = None) -> Runner:
    """The fastest runner for a bundle.

    Args:
        threads: within an op; None for the runtime's own choice.
    """
    return WholeRunner(OnnxRuntimeStage(bundle, threads=threads))


def open_split_runner(bundle: Bundle, threads: int | None = None) -> SplitRunner:
    """The fastest runner for the two halves of a bundle that is split at an exit.

    Raises:
        BundleError: the bundle has no such graphs.
    """
    late = OnnxRuntimeStage(bundle, "verify", threads=threads)
    return SplitRunner(OnnxRuntimeStage(bundle, "draft", threads=threads, shares_head=late), late)
