"""The two variants of TensorRT behind one interface: the module of each, and how it is loaded.

Importing this module does not import TensorRT.
"""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.preload import preload_tensorrt_rtx

Backend = Literal["tensorrt", "tensorrt-rtx"]

_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Compute capabilities that a TensorRT-RTX engine is built for if this machine has no GPU. Turing (75) is left out:
# there TensorRT-RTX has no FP32 matrix products, which gates need, and no bfloat16.
_RTX_TARGETS = ("80", "86", "89", "120", "121")


def load_module(backend: Backend) -> Any:
    """Load the Python module of a backend.

    Raises:
        EngineError: it is not installed, or does not load.
    """
    name = _MODULES[backend]
    todo = f"pip install {backend}"
    if find_spec(name) is None:
        raise EngineError(f"backend {backend}: is not installed", expected=f"the package {backend}", todo=todo)
    try:
        if backend == "tensorrt-rtx":
            preload_tensorrt_rtx()
        return importlib.import_module(name)
    except Exception as error:  # a missing driver or library shows in many ways
        raise EngineError(
            f"backend {backend}: does not load", found=str(error).strip().splitlines()[0], todo="gsx doctor"
        ) from error


def default_targets(module: ModuleType) -> tuple[str, ...]:
    """Compute capabilities that this TensorRT-RTX builds for by default, e.g. "89" for 8.9."""
    return tuple(target for target in _RTX_TARGETS if target in known_targets(module))


def known_targets(module: ModuleType) -> tuple[str, ...]:
    """Compute capabilities that this TensorRT-RTX can build for, e.g. "89" for 8.9."""
    names = module.ComputeCapability.__members__
    return tuple(sorted((name[2:] for name in names if name.startswith("SM")), key=int))


def has_fp8(target: str) -> bool:
    """Whether GPUs of a compute capability have FP8 products: Ada (8.9) and everything later."""
    return int(target) >= 89


def dotted(target: str) -> str:
    """A compute capability as people write it: "89" -> "8.9"."""
    return f"{target[:-1]}.{target[-1]}" if len(target) > 1 else target


def platform_name() -> str:
    """Operating system and processor, which an engine is tied to, e.g. "linux-x86_64"."""
    return f"{sys.platform}-{platform.machine().lower()}"
