"""Gives memory that a server has freed back to the system.

Requests of all lengths come and go, so freed blocks lie between blocks in use, and glibc keeps them: its heap grows to
what the largest requests that ever met needed. From time to time its free pages are given back.
"""

from __future__ import annotations

import ctypes
import time

# Between two times: giving 112 MB back took 16 ms, in which no request gets a token.
SECONDS = 10.0


class Trimmer:
    """Gives free pages back from time to time, and only after work. Does nothing where the C library is not glibc.

    Args: seconds: at least so many between two times.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._seconds, self._next = seconds, time.monotonic() + seconds
        self._has_worked = False

    @property
    def wait(self) -> float | None:
        """Seconds until the next time; None if there is nothing to give back."""
        return max(0.0, self._next - time.monotonic()) if self._has_worked and self._trim is not None else None

    def worked(self) -> None:
        """Note that there was work, which may have freed memory."""
        self._has_worked = True

    def turn(self) -> bool:
        """Give free pages back if the time has come. Returns: whether it had."""
        if self._trim is None or self.wait != 0.0:
            return False
        self._trim(ctypes.c_size_t(0))
        self._next = time.monotonic() + self._seconds
        self._has_worked = False
        return True
