"""Kernels compiled by TensorRT-RTX, kept across runs.

An engine of TensorRT-RTX contains no kernels: they are compiled for the GPU at hand when the engine first runs. Its
runtime cache collects them and serializes them to bytes, and this module stores these bytes in files. TensorRT-RTX
itself checks what it is given (version, GPU, driver) and refuses what does not fit; then it only has to compile again.
"""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

from gsx_plugins.files import cache_folder, writing_file

_FOLDER = "tensorrt-rtx-kernels"


def kernel_cache_path(engine_sha256: str, capability: str) -> Path:
    """Path of the kernels of an engine for GPUs of a compute capability, such as "89"."""
    return cache_folder() / _FOLDER / f"{engine_sha256}-sm{capability}.bin"


def attach(config: Any, path: Path, owner: object) -> None:
    """Load the kernels of a runtime configuration from a file, and save them to it at the end.

    Args:
        config: `IRuntimeConfig` of TensorRT-RTX.
        path: the file; it need not exist yet.
        owner: the kernels are saved when this object is deleted, or when the process ends.
    """
    cache = config.create_runtime_cache()
    known = load(cache, path)
    config.set_runtime_cache(cache)
    weakref.finalize(owner, save, cache, path, known)


def load(cache: Any, path: Path) -> bytes:
    """Pass a file's content to a runtime cache. Returns: the accepted content; empty if refused, or without a file."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if content and cache.deserialize(content) else b""


def save(cache: Any, path: Path, known: bytes) -> None:
    """Write the content of a runtime cache, whole or not at all, unless the file has it already.

    Args:
        known: what `load` returned.
    """
    content = bytes(cache.serialize())
    if not content or content == known:
        return
    # Without space or permission the next start compiles again, which is no reason to fail now.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as work:
            work.write_bytes(content)
