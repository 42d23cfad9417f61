"""Which runner executes a bundle on this machine."""

from __future__ import annotations

from engines.bundle.bundle import Bundle
from engines.runners.base import Runner
from engines.runners.onnxruntime import OnnxRuntimeRunner


def open_runner(bundle: Bundle, threads: int | None = None) -> Runner:
    """The fastest runner for a bundle.

    Args:
        threads: within an op; None for the runtime's own choice.
    """
    return OnnxRuntimeRunner(bundle, threads=threads)
