"""Kernels that TensorRT-RTX compiled, kept across runs.

An engine of TensorRT-RTX holds no kernels: they are compiled for the GPU that it meets, when it first runs. TensorRT's
runtime cache takes them up and gives them out as bytes; here are the files for these bytes. TensorRT itself checks what
it is given (its version, GPU, driver) and refuses what does not fit, which costs a start no more than the compilation.
"""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

from gsx_plugins.files import cache_folder, writing_file

_FOLDER = "tensorrt-rtx-kernels"


def kernel_cache_path(engine_sha256: str, capability: str) -> Path:
    """Where the kernels of an engine are kept for GPUs of a compute capability, as in "89"."""
    return cache_folder() / _FOLDER / f"{engine_sha256}-sm{capability}.bin"


def attach(config: Any, path: Path, owner: object) -> None:
    """Let the kernels of a runtime configuration come from a file and go back to it.

    Args:
        config: `IRuntimeConfig` of TensorRT-RTX.
        path: the file; it need not be there.
        owner: the kernels are saved when it is let go of, or the process ends.
    """
    cache = config.create_runtime_cache()
    known = load(cache, path)
    config.set_runtime_cache(cache)
    weakref.finalize(owner, save, cache, path, known)


def load(cache: Any, path: Path) -> bytes:
    """Give a runtime cache what a file holds. Returns: what it took; nothing where it refused, or there is no file."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if content and cache.deserialize(content) else b""


def save(cache: Any, path: Path, known: bytes) -> None:
    """Write what a runtime cache holds, whole or not at all, unless the file has it already.

    Args:
        known: what `load` returned.
    """
    content = bytes(cache.serialize())
    if not content or content == known:
        return
    # Without room or permission the next start compiles again: no reason to fail now.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as work:
            work.write_bytes(content)
