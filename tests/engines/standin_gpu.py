"""A stand-in for the GPU under `gsx_engines/tensorrt/execution.py`: CUDA's runtime and TensorRT, as far as it calls
them.

Order and addresses are as on a real GPU. Device memory is separate from the host's, and filled with garbage when it is
allocated; an access that is not entirely inside one block, or from the wrong side, fails. A stream does nothing until
it is waited for, and what a copy reads must stay unchanged until then. A recorded call keeps the addresses and shapes
that it was recorded with. Every call can be made to fail. The engine itself is the lowered graph, run by ONNX Runtime
(`cpu_engine.py`).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.engines.cpu_engine import CpuEngine

_RUBBISH = 0xFF  # NaN in every float type
_ALIGNMENT = 256  # of device memory, and of every address that TensorRT takes
_SUCCESS, _FAILURE, _LOST = 0, 999, 700  # cudaErrorUnknown, cudaErrorIllegalAddress
_KINDS = SimpleNamespace(
    cudaMemcpyHostToDevice=("host", "device"),
    cudaMemcpyDeviceToHost=("device", "host"),
    cudaMemcpyDeviceToDevice=("device", "device"),
)
Work = Callable[[], None]
# Columns of the K/V buffers of engines on it.
CAPACITY = 160


class StandInCuda:
    """The calls of `cuda.bindings.runtime`: each returns its code and its values.

    Attributes:
        launches: how many recorded graphs were replayed.
        calls: number of calls that can fail, including TensorRT's.
        fail_at: number of the call that fails; 0: no call fails.
        dies_at: number of the call from which on all fail, as after an illegal address; 0: none.
        refuses_recording: recording fails, as it does if TensorRT needs the host in between.
    """

    cudaMemcpyKind = _KINDS  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")  # noqa: N815

    def __init__(self) -> None:
        # Address -> size, and what keeps it.
        self._blocks: dict[int, tuple[int, ctypes.Array[ctypes.c_char]]] = {}
        self._pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._queues: dict[int, list[Work]] = {}
        self._handles = itertools.count(1)
        self._last_error = _SUCCESS
        self.calls = self.fail_at = self.dies_at = 0
        self._recording: list[Work] | None = None
        self._graphs: dict[int, list[Work]] = {}
        self.launches = 0
        self.refuses_recording = False

    @property
    def held(self) -> int:
        """Blocks of memory, streams and recordings that were not released."""
        return len(self._blocks) + len(self._pinned) + len(self._queues) + len(self._graphs)

    @property
    def is_dead(self) -> bool:
        """Whether nothing works any more."""
        return 0 < self.dies_at <= self.calls

    def fails(self) -> bool:
        """Whether the call that begins must fail."""
        self.calls += 1
        return self.is_dead or self.calls == self.fail_at

    def failed(self) -> int:
        """The code of a call that fails, which CUDA also remembers."""
        self._last_error = _LOST if self.is_dead else _FAILURE
        return self._last_error

    @property
    def remembers_error(self) -> bool:
        """Kernel launches are checked by CUDA's last error, so an old error is taken for theirs."""
        return self._last_error != _SUCCESS

    def array(self, address: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """Device memory as an array."""
        size = int(np.prod(shape)) * kind.itemsize
        self._check(address, size, "device")
        block = (ctypes.c_char * max(size, 1)).from_address(address)
        return np.frombuffer(block, kind, int(np.prod(shape))).reshape(shape)

    def enqueue(self, stream: int, work: Work) -> None:
        """Append work to a stream, or to the current recording."""
        (self._queues[stream] if self._recording is None else self._recording).append(work)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        if self.fails():
            return self.failed(), 0
        block = ctypes.create_string_buffer(bytes([_RUBBISH]) * (size + _ALIGNMENT), size + _ALIGNMENT)
        address = -(-ctypes.addressof(block) // _ALIGNMENT) * _ALIGNMENT
        self._blocks[address] = size, block
        return 0, address

    def cudaMallocHost(self, size: int) -> tuple[int, int]:  # noqa: N802
        if self.fails():
            return self.failed(), 0
        block = ctypes.create_string_buffer(bytes([_RUBBISH]) * size, size)
        self._pinned[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[int]:  # noqa: N802
        for stream in self._queues:  # CUDA waits for the device, too
            self._finish(stream)
        del self._pinned[address]
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        for stream in self._queues:  # CUDA waits for the device, too
            self._finish(stream)
        del self._blocks[address]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        if self.fails():
            return self.failed(), 0
        stream = next(self._handles)
        self._queues[stream] = []
        return 0, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        del self._queues[stream]
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        assert self._recording is None, "waiting for a stream that is being recorded"
        if self.fails():
            self._queues[stream].clear()  # after a GPU error nothing runs
            return (self.failed(),)
        self._finish(stream)
        return (0,)

    def _finish(self, stream: int) -> None:
        work, self._queues[stream] = self._queues[stream], []
        for one in work:
            one()

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        if self.fails():
            return (self.failed(),)
        self._check(address, size, "device")
        self.enqueue(stream, lambda: ctypes.memset(address, value, size))
        return (0,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, size: int, kind: tuple[str, str], stream: int
    ) -> tuple[int]:
        self._check(source, size, kind[0])
        self._check(target, size, kind[1])
        if self.fails():
            return (self.failed(),)
        before = ctypes.string_at(source, size) if kind[0] == "host" else None

        def copy() -> None:
            assert before in (None, ctypes.string_at(source, size)), "what is copied changed before it was"
            ctypes.memmove(target, source, size)

        self.enqueue(stream, copy)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[int]:  # noqa: N802
        if self.fails():
            return (self.failed(),)
        self._recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:  # noqa: N802
        assert self._recording is not None
        recorded, self._recording = self._recording, None
        if self.fails() or self.refuses_recording:
            return self.failed(), 0
        graph = next(self._handles)
        self._graphs[graph] = recorded
        return 0, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:  # noqa: N802
        if self.fails():
            return self.failed(), 0
        made = next(self._handles)
        self._graphs[made] = self._graphs[graph]
        return 0, made

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:  # noqa: N802
        del self._graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy  # noqa: N815

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:  # noqa: N802
        if self.fails():
            return (self.failed(),)
        self.launches += 1
        for work in self._graphs[graph]:
            self.enqueue(stream, work)
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        error, self._last_error = self._last_error, _LOST if self.is_dead else _SUCCESS
        return (error,)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"made to fail"

    def _check(self, address: int, size: int, side: str) -> None:
        inside = [at for at, (room, _) in self._blocks.items() if at <= address and address + size <= at + room]
        assert bool(inside) == (side == "device"), f"{size} bytes at {address:#x} are not {side} memory"


class StandInTensorRT:
    """The module `tensorrt` or `tensorrt_rtx`, for one engine.

    Args:
        cuda: the CUDA runtime.
        engine: what the engine computes.
    Attributes:
        config: the runtime configuration that contexts were made with.
        calls: how often an engine was enqueued, not counting replays.
        takes: whether it accepts an engine.
        scratch: the memory that contexts were given to compute in, by address, each once.
    """

    takes = True
    __version__ = "0"
    float32 = np.dtype(np.float32)
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    TensorLocation = SimpleNamespace(HOST="host", DEVICE="device")
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(NONE="none", LAZY="lazy")
    EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    def __init__(self, cuda: StandInCuda, engine: CpuEngine) -> None:
        self.cuda, self.engine = cuda, engine
        self.config: Any = None
        self.calls = 0
        self.scratch: dict[int, int] = {}

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: _Engine(self) if self.takes else None,
            get_engine_validity=lambda header: ("invalid", 2),
            engine_header_size=64,
        )


class _Engine:
    """`ICudaEngine`."""

    def __init__(self, trt: StandInTensorRT) -> None:
        self.trt = trt
        session = trt.engine.session
        self.inputs = {value.name for value in session.get_inputs()}
        self.axes = {value.name: len(value.shape) for value in session.get_inputs()}
        self.types: Mapping[str, np.dtype[Any]] = trt.engine.types
        self.names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        return self.types[name]

    def get_tensor_mode(self, name: str) -> str:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> str:
        return self.trt.TensorLocation.HOST if name == "k" else self.trt.TensorLocation.DEVICE

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cuda_graph_strategy=self.trt.CudaGraphStrategy.DISABLED)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "memory", strategy)
        return config

    # Of the largest call of any profile.
    device_memory_size_v2 = 1000

    def create_execution_context(self, strategy: str = "static", runtime_config: Any = None) -> _Context | None:
        self.trt.config = runtime_config
        assert (strategy if runtime_config is None else runtime_config.memory) == "user"
        return None if self.trt.cuda.fails() else _Context(self)


class _Context:
    """`IExecutionContext`."""

    def __init__(self, engine: _Engine) -> None:
        self._engine, self._trt = engine, engine.trt
        self._ranges: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] | None = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        known = self._trt.engine.ranges
        self._ranges = known[profile] if profile < len(known) else None
        return self._ranges is not None and not self._trt.cuda.fails()

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % _ALIGNMENT == 0
        assert size >= self._engine.device_memory_size_v2
        self._scratch = address
        self._trt.scratch[address] = size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._ranges is not None
        if self._trt.cuda.fails() or len(shape) != self._engine.axes[name]:
            return False
        least, _, most = self._ranges.get(name, (shape, shape, shape))
        self._shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self._trt.cuda.fails() or address % _ALIGNMENT:
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self._trt.cuda.fails() or self._trt.cuda.remembers_error:
            return False
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        assert set(addresses) == set(self._engine.names), "a tensor without an address"
        for name, address in addresses.items():
            if name.startswith("present."):
                assert address == addresses[name.replace("present", "past_key_values")], "K/V are not in place"
        on_host = {name: ctypes.c_int64.from_address(addresses[name]).value for name in addresses if name == "k"}
        self._trt.calls += 1
        self._trt.cuda.enqueue(stream, lambda: self._compute(addresses, shapes, on_host))
        return True

    def _compute(
        self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], on_host: Mapping[str, int]
    ) -> None:
        cuda, engine = self._trt.cuda, self._engine
        cuda.array(self._scratch, (engine.device_memory_size_v2,), np.dtype(np.uint8))[:] = _RUBBISH
        given = {
            name: np.array([on_host[name]])
            if name in on_host
            else cuda.array(addresses[name], shapes[name], engine.types[name]).copy()
            for name in engine.inputs
        }
        session = self._trt.engine.session
        names = [value.name for value in session.get_outputs()]
        for name, value in zip(names, session.run(names, given), strict=True):
            cuda.array(addresses[name], value.shape, value.dtype)[...] = value
