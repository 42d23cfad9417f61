"""Gives memory that a server has freed back to the system.

Requests come and go in all lengths, so what they free lies between what others still use, and glibc keeps it: its heap
grows for as long as rare requests meet by chance. Now and then its free pages are given back.
"""

from __future__ import annotations

import ctypes
import time

SECONDS = 30.0


class Trimmer:
    """Gives free pages back, at most once in a while. Does nothing where the C library cannot (only glibc can).

    Args: seconds: between two times.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._seconds, self._next = seconds, time.monotonic() + seconds

    def turn(self) -> bool:
        """Give back what is free, if it is time. Returns: whether it was."""
        now = time.monotonic()
        if self._trim is None or now < self._next:
            return False
        self._trim(0)
        self._next = now + self._seconds
        return True
