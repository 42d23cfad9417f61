"""A stand-in for the GPU under `engines/tensorrt/execution.py`: CUDA's runtime and TensorRT, as far as it calls them.

What is real is the order and the place of things. Device memory is apart from the host's, and filled with rubbish when
it is given out; an access that is not wholly inside one block of it, or from the wrong side, fails. A stream does
nothing before it is waited for, so a copy whose source has gone by then copies rubbish. A recorded call keeps the
addresses and shapes that it was recorded with. The engine itself is the lowered graph, run by ONNX Runtime
(`cpu_engine.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.engines.cpu_engine import CpuEngine

_RUBBISH = 0xFF  # NaN in every float type
_KINDS = SimpleNamespace(
    cudaMemcpyHostToDevice=("host", "device"),
    cudaMemcpyDeviceToHost=("device", "host"),
    cudaMemcpyDeviceToDevice=("device", "device"),
)
Work = Callable[[], None]


class StandInCuda:
    """The calls of `cuda.bindings.runtime`: each returns its code and its values.

    Attributes:
        launches: how many recorded graphs were replayed.
        refuses_recording: recording fails, as it does where TensorRT needs the host in between.
    """

    cudaMemcpyKind = _KINDS  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")  # noqa: N815

    def __init__(self) -> None:
        self._blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._queues: dict[int, list[Work]] = {}
        self._recording: list[Work] | None = None
        self._graphs: dict[int, list[Work]] = {}
        self.launches = 0
        self.refuses_recording = False

    @property
    def held(self) -> int:
        """Blocks of memory and recordings that were not given back."""
        return len(self._blocks) + len(self._graphs)

    def array(self, address: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """Device memory as an array."""
        size = int(np.prod(shape)) * kind.itemsize
        self._check(address, size, "device")
        block = (ctypes.c_char * max(size, 1)).from_address(address)
        return np.frombuffer(block, kind, int(np.prod(shape))).reshape(shape)

    def enqueue(self, stream: int, work: Work) -> None:
        """Put work at a stream's end, or into what is being recorded."""
        (self._queues[stream] if self._recording is None else self._recording).append(work)

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        block = ctypes.create_string_buffer(bytes([_RUBBISH]) * size, size)
        self._blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self._blocks[address]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        self._queues[len(self._queues) + 1] = []
        return 0, len(self._queues)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        assert self._recording is None, "waiting for a stream that is being recorded"
        work, self._queues[stream] = self._queues[stream], []
        for one in work:
            one()
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        self._check(address, size, "device")
        self.enqueue(stream, lambda: ctypes.memset(address, value, size))
        return (0,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, size: int, kind: tuple[str, str], stream: int
    ) -> tuple[int]:
        self._check(source, size, kind[0])
        self._check(target, size, kind[1])
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[int]:  # noqa: N802
        self._recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:  # noqa: N802
        assert self._recording is not None
        number = len(self._graphs) + 1
        self._graphs[number], self._recording = self._recording, None
        return (901, 0) if self.refuses_recording else (0, number)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:  # noqa: N802
        self._graphs[-graph] = self._graphs[graph]
        return 0, -graph

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:  # noqa: N802
        del self._graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy  # noqa: N815

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:  # noqa: N802
        self.launches += 1
        for work in self._graphs[graph]:
            self.enqueue(stream, work)
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        return (0,)

    def _check(self, address: int, size: int, side: str) -> None:
        inside = [at for at, block in self._blocks.items() if at <= address and address + size <= at + len(block)]
        assert bool(inside) == (side == "device"), f"{size} bytes at {address:#x} are not {side} memory"


class StandInTensorRT:
    """The module `tensorrt` or `tensorrt_rtx`, for one engine.

    Args:
        cuda: the runtime beside it.
        engine: what the engine computes.
    Attributes:
        config: the runtime configuration that contexts were made with.
        calls: how often an engine was enqueued, replays not counted.
        takes: whether it takes an engine.
    """

    takes = True
    __version__ = "0"
    float32 = np.dtype(np.float32)
    TensorLocation = SimpleNamespace(HOST="host", DEVICE="device")
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole")
    EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            pass

    def __init__(self, cuda: StandInCuda, engine: CpuEngine) -> None:
        self.cuda, self.engine = cuda, engine
        self.config: Any = None
        self.calls = 0

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
        return SimpleNamespace(cuda_graph_strategy=self.trt.CudaGraphStrategy.DISABLED)

    def create_execution_context(self, runtime_config: Any = None) -> _Context:
        self.trt.config = runtime_config
        return _Context(self)


class _Context:
    """`IExecutionContext`."""

    def __init__(self, engine: _Engine) -> None:
        self._engine, self._trt = engine, engine.trt
        self._ranges: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] | None = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        known = self._trt.engine.ranges
        self._ranges = known[profile] if profile < len(known) else None
        return self._ranges is not None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._ranges is not None
        least, _, most = self._ranges.get(name, (shape, shape, shape))
        self._shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
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
