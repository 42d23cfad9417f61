"""The GPU and its memory, over the CUDA runtime of `cuda-bindings`: what a runner needs, with readable errors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from gsx_engines.errors import EngineError, LostGpuError

_PACKAGE = "cuda-bindings"
# Errors after which every call of the process fails. CUDA's header (driver_types.h, 13.0) says of all but the first two
# that the process must be terminated: contained, illegal address, launch timeout, assert, hardware stack, illegal
# instruction, misaligned address, address space, program counter, launch failure, tensor memory leak, the MPS client's
# end, external device. Of ECC and NVLink it says that the error cannot be corrected.
ENDS_PROCESS = frozenset({214, 220, 226, 700, 702, 710, *range(714, 720), 721, 810, 911})
START_AGAIN = "start the process again; if that happens again, look for the GPU's errors with dmesg and nvidia-smi"


@dataclass(frozen=True)
class Device:
    """The GPU in use.

    Args:
        name: as NVIDIA calls it.
        capability: compute capability, "89" for 8.9.
        memory_bytes: total memory.
    """

    name: str
    capability: str
    memory_bytes: int


@functools.cache
def _look() -> tuple[Device | None, str]:
    """The GPU, or None and the reason."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None, f"no package {_PACKAGE}"
    try:
        error, count = runtime.cudaGetDeviceCount()
    except RuntimeError as problem:  # no CUDA runtime library
        return None, str(problem).splitlines()[0]
    if error == runtime.cudaError_t.cudaErrorInsufficientDriver:  # also if there is no driver
        return None, f"no NVIDIA driver, or one that is too old for CUDA {_version_of(runtime)}"
    if error != runtime.cudaError_t.cudaSuccess:
        return None, _text(runtime, error)
    if count == 0:
        return None, "no CUDA device"
    error, found = runtime.cudaGetDeviceProperties(0)
    if error != runtime.cudaError_t.cudaSuccess:
        return None, _text(runtime, error)
    name = found.name.decode().rstrip("\0") if isinstance(found.name, bytes) else str(found.name)
    return Device(name, f"{found.major}{found.minor}", int(found.totalGlobalMem)), ""


def device() -> Device | None:
    """The GPU of this process, or None."""
    return _look()[0]


def why_not() -> str:
    """Why there is no GPU; empty if there is one."""
    return _look()[1]


def runtime() -> Any:
    """The CUDA runtime; its calls go through `check`.

    Raises:
        EngineError: there is no GPU.
    """
    if device() is None:
        raise EngineError(
            "no NVIDIA GPU can be used",
            expected="a GPU, its driver and the package cuda-bindings",
            found=why_not(),
            todo='pip install "gsx[tensorrt]" on a machine with a GPU; without --backend, ONNX Runtime runs the bundle',
        )
    from cuda.bindings import runtime as module

    return module


def check(answer: tuple[Any, ...], doing: str) -> Any:
    """The value of a CUDA call.

    Args:
        answer: what the call returned: its error code, then its values.
        doing: what the call was for, for the message.
    Raises:
        EngineError: the code is not success.
        LostGpuError: it is one after which nothing works in this process.
    """
    error, *values = answer
    if int(error) != 0:
        module = runtime()
        module.cudaGetLastError()  # see `forget_error`
        if int(error) in ENDS_PROCESS:
            raise LostGpuError(
                f"CUDA failed while {doing}, and this process cannot use the GPU any more",
                found=_text(module, error),
                todo=START_AGAIN,
            )
        raise EngineError(f"CUDA failed while {doing}", found=_text(module, error))
    return values[0] if len(values) == 1 else tuple(values) if values else None


def _version_of(module: Any) -> str:
    """Version of the CUDA runtime, e.g. 13.0."""
    _, version = module.cudaRuntimeGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}"


def forget_error(answer: tuple[Any, ...]) -> None:
    """Clear CUDA's last error after a failure that is ignored.

    Otherwise it would be taken for an error of the next kernel, whose launch is checked by CUDA's last error (CUB,
    plugins).

    Raises:
        LostGpuError: it cannot be ignored.
    """
    if int(answer[0]) in ENDS_PROCESS:
        check(answer, "ending a failed call")
    elif int(answer[0]) != 0:
        runtime().cudaGetLastError()


def _text(module: Any, error: Any) -> str:
    _, text = module.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)
