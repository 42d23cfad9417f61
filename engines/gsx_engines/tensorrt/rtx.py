"""Run-time features that only TensorRT-RTX has: a configuration for contexts, and a reason why it refuses an engine.

TensorRT-RTX compiles its engines for the shapes that occur: a call with new shapes runs general kernels, specialized
kernels are compiled in the background, and later calls use them. A recording of our own would keep the general kernels
for ever. TensorRT-RTX instead records by itself once the specialized kernels are ready, and runs normally if it cannot
record (NVIDIA's documentation, "Working with RTX CUDA Graphs").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gsx_engines.tensorrt import kernel_cache


def runtime_config(
    trt: Any, engine: Any, *, kernels: Path | None, cuda_graphs: bool, fixed_rows: bool, owner: object
) -> Any:
    """A runtime configuration for the execution contexts of an engine.

    Args:
        trt: the module `tensorrt_rtx`.
        engine: its `ICudaEngine`.
        kernels: file to load compiled kernels from and save them to; None to compile them each time.
        cuda_graphs: have TensorRT-RTX record calls and replay them. Ignored for engines with an input on the host: it
            is read while a call is prepared, and a replay skips that.
        fixed_rows: the host knows how many rows each branch runs on. Where the GPU counts them, nearly every prompt has
            new numbers in every layer: compiling kernels for these would take the processor that waits for the GPU.
        owner: kernels are saved when this object is deleted, or when the process ends.
    """
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if kernels is not None:
        kernel_cache.attach(config, kernels, owner)
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    if cuda_graphs and not any(engine.get_tensor_location(name) == trt.TensorLocation.HOST for name in names):
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    if not fixed_rows:
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.NONE
    return config


def why_refused(trt: Any, runtime: Any, plan: bytes) -> str:
    """Why TensorRT-RTX refuses an engine, e.g. "unsupported cc"; empty if it does not say.

    Args:
        trt: the module `tensorrt_rtx`.
        runtime: its `Runtime`.
        plan: the engine's bytes; only the header is read.
    """
    _, found = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    reasons = trt.EngineInvalidityDiagnostics.__members__.items()
    return ", ".join(name.replace("_", " ").lower() for name, flag in reasons if int(found) & int(flag))
