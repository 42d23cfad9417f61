"""Giving memory back to the system as soon as it is free.

glibc keeps freed blocks of up to 32 MB for later, which is most of what verifying needs for a moment: without this, its
peak is one and a half times as high. With other C libraries nothing happens.
"""

from __future__ import annotations

import ctypes
import gc
import platform

# `M_MMAP_THRESHOLD` of malloc.h: blocks of at least this size are mappings of their own, which end when they are freed.
_MMAP_THRESHOLD = -3


def keep_apart(*, from_bytes: int) -> None:
    """From now on, blocks of this size and more go back when they are freed, and are paid for when they are needed."""
    if library := _glibc():
        library.mallopt(_MMAP_THRESHOLD, from_bytes)


def give_back(*, cycles: bool = False) -> None:
    """Give back what is free, such as a closed session's weights. Args: cycles: whether to free those first."""
    if cycles:
        gc.collect()
    if library := _glibc():
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
