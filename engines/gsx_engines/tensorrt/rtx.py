"""What TensorRT-RTX alone has at run time: a configuration for contexts, and a word on why it refuses an engine.

Its engines are compiled for the shapes that they meet: a call of new shapes runs general kernels, special ones are
compiled beside it, and later calls have those. That is why recording a stream by hand is not enough: it would keep the
general kernels for ever. TensorRT-RTX records by itself once the special ones are there, and runs as before where it
cannot (NVIDIA's documentation, "Working with RTX CUDA Graphs").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gsx_engines.tensorrt import kernel_cache


def runtime_config(trt: Any, engine: Any, *, kernels: Path | None, cuda_graphs: bool, owner: object) -> Any:
    """A runtime configuration for the execution contexts of an engine.

    Args:
        trt: the module `tensorrt_rtx`.
        engine: its `ICudaEngine`.
        kernels: file that compiled kernels come from and go back to; None to compile anew each time.
        cuda_graphs: let TensorRT-RTX record calls and replay them. Not done where an input stays on the host: it is
            read while a call is prepared, which a replayed call is not.
        owner: kernels are saved when it is let go of, or the process ends.
    """
    config = engine.create_runtime_config()
    if kernels is not None:
        kernel_cache.attach(config, kernels, owner)
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    if cuda_graphs and not any(engine.get_tensor_location(name) == trt.TensorLocation.HOST for name in names):
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return config


def why_refused(trt: Any, runtime: Any, plan: bytes) -> str:
    """What TensorRT-RTX has against an engine, e.g. "unsupported cc"; empty where it does not say.

    Args:
        runtime: its `Runtime`.
        plan: the engine's bytes, of which the first ones are read.
    """
    _, found = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    reasons = trt.EngineInvalidityDiagnostics.__members__.items()
    return ", ".join(name.replace("_", " ").lower() for name, flag in reasons if int(found) & int(flag))
