"""One engine on a GPU: device memory that stays, a stream, and a context for each profile.

What the engine is for is the runner's business (`engines/runners/tensorrt.py`). Calls of the same shapes may be
recorded as a CUDA graph and replayed: with TensorRT here, while TensorRT-RTX does so by itself (`rtx.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import EngineError
from engines.tensorrt import cuda
from engines.tensorrt.backend import Backend, load_module
from engines.tensorrt.plugins import load_plugins
from engines.tensorrt.rtx import runtime_config, why_refused


class DeviceArray:
    """Device memory of a fixed size, freed with the object.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self._runtime = cuda.runtime()
        self.address = int(cuda.check(self._runtime.cudaMalloc(self.size), f"asking for {self.size} bytes"))

    def clear(self, stream: int) -> None:
        """Fill with zeros."""
        cuda.check(self._runtime.cudaMemsetAsync(self.address, 0, self.size, stream), "clearing memory")

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._runtime.cudaFree(self.address)


class CudaEngine:
    """A deserialised engine, ready to be called.

    Args:
        backend: which TensorRT.
        plan: the engine's bytes.
        library: the plugin library that it needs.
        cuda_graphs: record calls whose shapes were seen before, and replay them.
        kernels: file for the kernels that TensorRT-RTX compiles, if they are kept; TensorRT's engines hold theirs.
    Raises:
        EngineError: no GPU, or TensorRT does not take the engine.
    """

    def __init__(
        self, backend: Backend, plan: bytes, *, library: Path | None, cuda_graphs: bool, kernels: Path | None
    ) -> None:
        self._runtime = cuda.runtime()
        self._trt = load_module(backend)
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._trt_runtime = self._trt.Runtime(self._logger)
        if library is not None:
            load_plugins(self._trt_runtime.get_plugin_registry(), library)
        self._engine = self._trt_runtime.deserialize_cuda_engine(plan)
        is_rtx = backend == "tensorrt-rtx"
        if self._engine is None:
            reason = why_refused(self._trt, self._trt_runtime, plan) if is_rtx else ""
            raise EngineError(
                f"{backend} {self._trt.__version__} does not take the engine",
                found=reason or "the reason stands above, in TensorRT's words",
                todo="gsx build builds it anew for this machine",
            )
        self.stream = int(cuda.check(self._runtime.cudaStreamCreate(), "making a stream"))
        self._config = None
        if is_rtx:
            self._config = runtime_config(self._trt, self._engine, kernels=kernels, cuda_graphs=cuda_graphs, owner=self)
        self._contexts: dict[int, _Context] = {}
        self._records = cuda_graphs and not is_rtx

    def buffer(self, shape: tuple[int, ...], name: str) -> DeviceArray:
        """Zeroed device memory for an input or output."""
        memory = DeviceArray(self._bytes(name, shape))
        memory.clear(self.stream)
        return memory

    def move(self, buffer: DeviceArray, shape: tuple[int, ...], source: int, target: int) -> None:
        """Copy a row of a buffer [rows, ..] over another one, in the order of the calls."""
        runtime, size = self._runtime, buffer.size // shape[0]
        copied = runtime.cudaMemcpyAsync(
            buffer.address + target * size,
            buffer.address + source * size,
            size,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
            self.stream,
        )
        cuda.check(copied, "moving a sequence")

    def run(
        self,
        profile: int,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[DeviceArray, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """One call.

        Args:
            profile: number of the optimization profile.
            feeds: inputs from the host.
            buffers: inputs and outputs that stay on the device: memory and shape. An output that continues an input
                has the input's memory.
            results: outputs that are wanted on the host: their shapes.
        Returns: the results, float32 or int64.
        """
        context = self._contexts.get(profile)
        if context is None:
            context = self._contexts[profile] = _Context(self, profile)
        return context.run(feeds, buffers, results)

    def new_context(self) -> Any:
        """An execution context; None where there is no memory for one."""
        if self._config is None:
            return self._engine.create_execution_context()
        return self._engine.create_execution_context(runtime_config=self._config)

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * int(self._engine.get_tensor_dtype(name).itemsize)


class _Context:
    """An execution context on one profile, with the memory of its small inputs and its results."""

    def __init__(self, owner: CudaEngine, profile: int) -> None:
        self._owner, self._engine, self._runtime = owner, owner._engine, owner._runtime
        self._trt, self._stream = owner._trt, owner.stream
        self._context = owner.new_context()
        if self._context is None:
            raise EngineError("TensorRT has no memory for an execution context", todo="gsx build with less --context")
        if not self._context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"the engine has no profile {profile}", todo="gsx build builds it anew")
        self._memory: dict[str, DeviceArray] = {}
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._graph: Any = None
        self._calls_alike = 0

    def __del__(self) -> None:
        if getattr(self, "_graph", None) is not None:
            self._runtime.cudaGraphExecDestroy(self._graph)

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[DeviceArray, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """See `CudaEngine.run`."""
        runtime, stream = self._runtime, self._stream
        host = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        before = dict(self._bound)
        on_host = False
        for name, value in host.items():
            if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
                on_host = True  # read while the call is prepared, so a recording would keep its value
                self._context.set_tensor_address(name, value.ctypes.data)
                continue
            memory = self._room(name, value.nbytes)
            copied = runtime.cudaMemcpyAsync(
                memory.address, value.ctypes.data, value.nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, stream
            )
            cuda.check(copied, f"copying {name} to the GPU")
            self._bind(name, memory.address, value.shape)
        for name, (memory, shape) in buffers.items():
            self._bind(name, memory.address, shape)
        found: dict[str, np.ndarray] = {}
        for name, shape in results.items():
            kind = np.float32 if self._engine.get_tensor_dtype(name) == self._trt.float32 else np.int64
            found[name] = np.empty(shape, kind)
            self._bind(name, self._room(name, found[name].nbytes).address, shape)
        self._calls_alike = self._calls_alike + 1 if self._bound == before and not on_host else 0
        self._enqueue()
        for name, value in found.items():
            copied = runtime.cudaMemcpyAsync(
                value.ctypes.data,
                self._memory[name].address,
                value.nbytes,
                runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
                stream,
            )
            cuda.check(copied, f"copying {name} from the GPU")
        cuda.check(runtime.cudaStreamSynchronize(stream), "running the engine")
        return found

    def _room(self, name: str, size: int) -> DeviceArray:
        """Memory of a name, kept across calls; it grows in steps, so that a growing window seldom moves it."""
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            memory = self._memory[name] = DeviceArray(1 << (max(size, 1) - 1).bit_length())
        return memory

    def _bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        if self._bound.get(name) == (address, shape):
            return
        is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        if is_input and not self._context.set_input_shape(name, shape):
            raise EngineError(f"the engine does not take {name} of shape {list(shape)}", todo="gsx build --profile")
        self._context.set_tensor_address(name, address)
        self._bound[name] = (address, shape)

    def _enqueue(self) -> None:
        """Run, or replay what was recorded for the same shapes and addresses."""
        runtime, stream = self._runtime, self._stream
        if self._calls_alike == 0 and self._graph is not None:
            cuda.check(runtime.cudaGraphExecDestroy(self._graph), "dropping a CUDA graph")
            self._graph = None
        if self._graph is None and self._wants_graph():
            self._graph = self._record()
        if self._graph is not None:
            cuda.check(runtime.cudaGraphLaunch(self._graph, stream), "replaying a CUDA graph")
        elif not self._context.execute_async_v3(stream):
            raise EngineError("TensorRT could not run the engine", found="the reason stands above, in its words")

    def _wants_graph(self) -> bool:
        """Two plain calls of these shapes come first: TensorRT sets itself up in them."""
        return self._owner._records and self._calls_alike >= 2

    def _record(self) -> Any:
        """A CUDA graph of the call; None where TensorRT cannot be recorded, now or ever after."""
        runtime, stream = self._runtime, self._stream
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.check(runtime.cudaStreamBeginCapture(stream, mode), "recording a CUDA graph")
        enqueued = self._context.execute_async_v3(stream)
        error, graph = runtime.cudaStreamEndCapture(stream)
        if not enqueued or int(error) != 0:
            if int(error) == 0:
                runtime.cudaGraphDestroy(graph)
            self._owner._records = False
            runtime.cudaGetLastError()  # a failed recording leaves an error behind, and the call is yet to be made
            return None
        made = cuda.check(runtime.cudaGraphInstantiate(graph, 0), "making a CUDA graph")
        cuda.check(runtime.cudaGraphDestroy(graph), "dropping a recording")
        return made
