"""One engine on a GPU: persistent device memory, a stream, and a context for each profile.

Only the runner knows what the engine computes (`gsx_engines/runners/tensorrt.py`). Calls of the same shapes can be
recorded as a CUDA graph and replayed: for TensorRT this is done here, TensorRT-RTX does it by itself (`rtx.py`).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gsx_engines.errors import EngineError
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.backend import Backend, load_module
from gsx_engines.tensorrt.bound import BoundBuffers
from gsx_engines.tensorrt.plugins import load_plugins
from gsx_engines.tensorrt.rtx import runtime_config, why_refused

# TensorRT requires every address to be a multiple of this, on the host too (IExecutionContext::setTensorAddress).
_ALIGNMENT = 256
# A CUDA graph is recorded after this many identical calls: TensorRT allocates and initializes in the first ones.
_CALLS_BEFORE_RECORDING = 2
# Kinds of calls that are remembered, with a recording each: sets of layers that alternate, such as those of a draft and
# of its verification, and the last windows.
_MOST_RECORDINGS = 32
# What is larger crosses to the host seldom (a long prompt's exit state, the logits of all its tokens), and would pin
# memory for good.
_MOST_PINNED = 4 << 20


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


class PinnedArray:
    """Host memory of a fixed size that the GPU copies from and to by itself, freed with the object.

    Copies of other memory wait for the stream before they begin, and copies to it until they are done.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self._runtime = cuda.runtime()
        self._address = int(cuda.check(self._runtime.cudaMallocHost(self.size), f"pinning {self.size} bytes"))
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self._address))

    def array(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """Its beginning as an array."""
        return self._bytes[: math.prod(shape) * kind.itemsize].view(kind).reshape(shape)

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._runtime.cudaFreeHost(self._address)


class Scratch:
    """Device memory in which contexts compute, one block for all that never run at the same time.

    By itself each context has a block of its own, as large as the largest call of any profile needs.
    """

    def __init__(self) -> None:
        self._size = 0
        self._memory: DeviceArray | None = None

    def reserve(self, size: int) -> None:
        """Make room for an engine. Contexts made before keep the block that they have."""
        self._size = max(self._size, size)

    def memory(self) -> DeviceArray:
        """The block, for a new context."""
        if self._memory is None or self._memory.size < self._size:
            self._memory = DeviceArray(self._size)
        return self._memory


@dataclass(frozen=True)
class DeviceRows:
    """Some rows of device memory, which live as long as all of it."""

    whole: DeviceArray
    address: int


class _RecordedGraph:
    """A CUDA graph that can be launched, freed with the object."""

    def __init__(self, handle: Any) -> None:
        self._runtime, self.handle = cuda.runtime(), handle

    def __del__(self) -> None:
        self._runtime.cudaGraphExecDestroy(self.handle)


class CudaEngine:
    """A deserialized engine, ready to be called.

    Args:
        backend: which TensorRT.
        plan: the engine's bytes.
        library: the plugin library that it needs, if any.
        cuda_graphs: record repeated calls of the same shapes, and replay them.
        kernels: file for the kernels that TensorRT-RTX compiles, or None; TensorRT's engines contain their kernels.
        fixed_rows: the host knows how many rows each branch runs on (`rtx.runtime_config`).
        beside: an engine that shares memory with this one, K and V or what both compute in; the calls of both are in
            one order.
    Raises:
        EngineError: no GPU, or TensorRT cannot load the engine.
    """

    def __init__(
        self,
        backend: Backend,
        plan: bytes,
        *,
        library: Path | None,
        cuda_graphs: bool,
        kernels: Path | None,
        fixed_rows: bool = True,
        beside: CudaEngine | None = None,
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
                f"{backend} {self._trt.__version__} cannot load the engine",
                found=reason or "see TensorRT's own message above",
                todo="gsx build builds it again for this machine",
            )
        self._beside = beside  # whose stream lives as long as it does
        if beside is None:
            self.stream = int(cuda.check(self._runtime.cudaStreamCreate(), "making a stream"))
            weakref.finalize(self, self._runtime.cudaStreamDestroy, self.stream).atexit = False
        else:
            self.stream = beside.stream
        self.scratch: Scratch = Scratch() if beside is None else beside.scratch
        self.scratch.reserve(int(self._engine.device_memory_size_v2))
        self._config = None
        if is_rtx:
            self._config = runtime_config(
                self._trt, self._engine, kernels=kernels, cuda_graphs=cuda_graphs, fixed_rows=fixed_rows, owner=self
            )
        self._contexts: dict[int, _Context] = {}
        # A recording would keep the old value of an input on the host.
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        on_host = any(self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST for name in names)
        self._records = cuda_graphs and not is_rtx and not on_host

    def buffer(self, shape: tuple[int, ...], name: str) -> DeviceArray:
        """Zeroed device memory for an input or output."""
        memory = DeviceArray(self._bytes(name, shape))
        memory.clear(self.stream)
        return memory

    def move(self, buffer: DeviceArray, shape: tuple[int, ...], source: int, target: int) -> None:
        """Copy a row of a buffer [rows, ..] over another one, in order with the calls."""
        runtime, size = self._runtime, buffer.size // shape[0]
        copied = runtime.cudaMemcpyAsync(
            buffer.address + target * size,
            buffer.address + source * size,
            size,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice,
            self.stream,
        )
        cuda.check(copied, "moving a sequence")

    def rows(self, buffer: DeviceArray, shape: tuple[int, ...], rows: slice) -> DeviceRows:
        """Some neighbouring rows of a buffer [rows, ..].

        Raises:
            EngineError: they begin at an address that TensorRT does not take.
        """
        start = rows.start * (buffer.size // shape[0])
        if start % _ALIGNMENT:
            raise EngineError(
                f"sequences of a batch do not begin at multiples of {_ALIGNMENT} bytes",
                expected=f"K/V buffers [{', '.join(map(str, shape))}] whose rows are multiples of it",
                found=f"{buffer.size // shape[0]} bytes a row",
                todo="gsx build --context with a multiple of 64",
            )
        return DeviceRows(buffer, buffer.address + start)

    def read(self, buffer: DeviceArray, shape: tuple[int, ...], row: int) -> np.ndarray:
        """A row of a buffer [rows, ..] of float32, after all calls so far."""
        found = np.empty(shape[1:], np.float32)
        to_host = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copied = self._runtime.cudaMemcpyAsync(
            found.ctypes.data, buffer.address + row * found.nbytes, found.nbytes, to_host, self.stream
        )
        cuda.check(copied, "copying logits from the GPU")
        cuda.check(self._runtime.cudaStreamSynchronize(self.stream), "copying logits from the GPU")
        return found

    def run(
        self,
        profile: int,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[DeviceArray | DeviceRows, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """One call.

        Args:
            profile: number of the optimization profile.
            feeds: inputs from the host.
            buffers: memory and shape of inputs and outputs that stay on the device. An output that continues an input
                uses the same memory.
            results: shapes of the outputs that are wanted on the host.
        Returns: the results, float32 or int64.
        Raises:
            EngineError: the call failed; another may succeed.
            LostGpuError: none will in this process.
        """
        try:
            context = self._contexts.get(profile)
            if context is None:
                context = self._contexts[profile] = _Context(self, profile)
            return context.run(feeds, buffers, results)
        except BaseException:
            # Copies that were queued before the failure may still read the inputs and write the results. And what
            # TensorRT only refused may be the end of the GPU.
            cuda.forget_error(self._runtime.cudaStreamSynchronize(self.stream))
            raise

    def new_context(self) -> Any:
        """Create an execution context, which needs `scratch`; None if there is not enough memory."""
        if self._config is None:
            return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return self._engine.create_execution_context(runtime_config=self._config)

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * int(self._engine.get_tensor_dtype(name).itemsize)


@dataclass
class _Kind:
    """Calls with the same shapes and addresses: how many there were, and their recording."""

    calls: int = 0
    graph: _RecordedGraph | None = None


class _Context:
    """An execution context for one profile, with memory for its small inputs and its results."""

    def __init__(self, owner: CudaEngine, profile: int) -> None:
        # The owner refers to its contexts: a reference cycle would keep GPU memory until Python collects cycles.
        self._owner: CudaEngine = weakref.proxy(owner)
        self._engine, self._runtime = owner._engine, owner._runtime
        self._trt, self._stream = owner._trt, owner.stream
        self._context = owner.new_context()
        if self._context is None:
            raise EngineError(
                "there is not enough memory for an execution context", todo="gsx build with a smaller --context"
            )
        if not self._context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"the engine has no profile {profile}", todo="build it again with gsx build")
        self._scratch = owner.scratch.memory()
        self._context.set_device_memory(self._scratch.address, self._scratch.size)
        # Wait here, so that a context whose profile could not be set is never kept.
        cuda.check(self._runtime.cudaStreamSynchronize(self._stream), "choosing a profile")
        self._memory: dict[str, DeviceArray] = {}
        self._host_memory: dict[str, np.ndarray] = {}
        self._pinned: dict[str, PinnedArray] = {}
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        # What the latest call bound. (Weakly: a context must not keep the memory of a cache that is gone.)
        self._latest: Callable[[], object] = lambda: None
        # By shapes and addresses, the latest last; and the one of the current bindings, once it is looked up.
        self._kinds: OrderedDict[frozenset[tuple[str, tuple[int, tuple[int, ...]]]], _Kind] = OrderedDict()
        self._kind: _Kind | None = None

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[DeviceArray | DeviceRows, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """See `CudaEngine.run`."""
        # What is copied must live until the call has ended. (Scalars keep their shape [].)
        given = [self._give(name, np.asarray(value, order="C")) for name, value in feeds.items()]
        if buffers is not self._latest():
            for name, (memory, shape) in buffers.items():
                self._bind(name, memory.address, shape)
            if isinstance(buffers, BoundBuffers):
                self._latest = weakref.ref(buffers)
        found = {name: self._on_host(name, shape, self._type(name)) for name, shape in results.items()}
        for name, value in found.items():
            self._bind(name, self._room(name, value.nbytes).address, value.shape)
        self._enqueue()
        to_host = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for name, value in found.items():
            copied = self._runtime.cudaMemcpyAsync(
                value.ctypes.data, self._memory[name].address, value.nbytes, to_host, self._stream
            )
            cuda.check(copied, f"copying {name} from the GPU")
        cuda.check(self._runtime.cudaStreamSynchronize(self._stream), "running the engine")
        given.clear()
        # The next call uses the pinned memory again.
        return {name: value.copy() if value.nbytes <= _MOST_PINNED else value for name, value in found.items()}

    def _give(self, name: str, value: np.ndarray) -> np.ndarray:
        """Pass an input to the engine. Returns: what the GPU will copy."""
        if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
            self._give_on_host(name, value)
            return value
        memory = self._room(name, value.nbytes)
        self._bind(name, memory.address, value.shape)
        if value.nbytes <= _MOST_PINNED:
            given = self._on_host(name, value.shape, value.dtype)
            np.copyto(given, value)
            value = given
        to_device = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        copied = self._runtime.cudaMemcpyAsync(memory.address, value.ctypes.data, value.nbytes, to_device, self._stream)
        cuda.check(copied, f"copying {name} to the GPU")
        return value

    def _give_on_host(self, name: str, value: np.ndarray) -> None:
        """Pass an input on the host, which is read while the call is prepared."""
        room = np.empty(value.nbytes + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        memory = self._host_memory[name] = room[start : start + value.nbytes]
        memory[:] = value.reshape(-1).view(np.uint8)
        if not self._context.set_tensor_address(name, memory.ctypes.data):
            self._refuse_memory(name)

    def _type(self, name: str) -> np.dtype[Any]:
        """The type on the host of a result."""
        is_float = self._engine.get_tensor_dtype(name) == self._trt.float32
        return np.dtype(np.float32 if is_float else np.int64)

    def _on_host(self, name: str, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """Host memory for a copy of a tensor: pinned and used again, unless it is large."""
        size = math.prod(shape) * kind.itemsize
        if size > _MOST_PINNED:
            return np.empty(shape, kind)
        memory = self._pinned.get(name)
        if memory is None or memory.size < size:
            memory = self._pinned[name] = PinnedArray(_rounded(size))
        return memory.array(shape, kind)

    def _room(self, name: str, size: int) -> DeviceArray:
        """Memory for a tensor, kept across calls. It grows in powers of two, so a growing window seldom moves it."""
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            memory = self._memory[name] = DeviceArray(_rounded(size))
        return memory

    def _bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        if self._bound.get(name) == (address, shape):
            return
        # First of all: if a part of this fails, the next call starts from scratch.
        self._kind, self._latest = None, lambda: None
        self._bound.pop(name, None)
        is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
        if is_input and not self._context.set_input_shape(name, shape):
            raise EngineError(f"the engine does not accept {name} with shape {list(shape)}", todo="gsx build --profile")
        if not self._context.set_tensor_address(name, address):
            self._refuse_memory(name)
        self._bound[name] = (address, shape)

    def _refuse_memory(self, name: str) -> NoReturn:
        raise EngineError(f"the engine does not accept the memory for {name}", found="see TensorRT's own message above")

    def _kind_of_call(self) -> _Kind:
        """What is known of calls with the current shapes and addresses."""
        key = frozenset(self._bound.items())
        kind = self._kinds.get(key) or _Kind()
        self._kinds[key] = kind
        self._kinds.move_to_end(key)
        if len(self._kinds) > _MOST_RECORDINGS:
            self._kinds.popitem(last=False)
        return kind

    def _enqueue(self) -> None:
        """Run the call, or replay its recording.

        A recording is made just after a call of its kind was run: with new shapes, TensorRT prepares things in the
        first call that a recording must not hold.
        """
        if self._kind is None:
            self._kind = self._kind_of_call()
        kind = self._kind
        if kind.graph is not None:
            launched = self._runtime.cudaGraphLaunch(kind.graph.handle, self._stream)
            cuda.check(launched, "replaying a CUDA graph")
            return
        if not self._context.execute_async_v3(self._stream):
            raise EngineError("TensorRT could not run the engine", found="see TensorRT's own message above")
        kind.calls += 1
        if self._owner._records and kind.calls >= _CALLS_BEFORE_RECORDING:
            kind.graph = self._record()

    def _record(self) -> _RecordedGraph | None:
        """Record the call as a CUDA graph, without running it. If that fails, None, and nothing is recorded again."""
        runtime, stream = self._runtime, self._stream
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.check(runtime.cudaStreamBeginCapture(stream, mode), "recording a CUDA graph")
        enqueued = self._context.execute_async_v3(stream)
        error, graph = runtime.cudaStreamEndCapture(stream)
        if not enqueued or int(error) != 0:
            if int(error) == 0:
                runtime.cudaGraphDestroy(graph)
            self._owner._records = False
            cuda.forget_error((error,))  # the call still has to run
            return None
        instantiated = runtime.cudaGraphInstantiate(graph, 0)
        runtime.cudaGraphDestroy(graph)
        return _RecordedGraph(cuda.check(instantiated, "making a CUDA graph"))


def _rounded(size: int) -> int:
    """The next power of two."""
    return 1 << (max(size, 1) - 1).bit_length()
