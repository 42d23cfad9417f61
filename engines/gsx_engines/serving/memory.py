"""Gives memory that a server has freed back to the system.

Requests come and go in all lengths, so what they free lies between what others still use, and glibc keeps it: its heap
grows for as long as rare requests meet by chance. Now and then its free pages are given back.
"""

from __future__ import annotations

import ctypes
import time

SECONDS = 10.0


class Trimmer:
    """Gives free pages back, at most once in a while, and only after work. Only glibc can; elsewhere it does nothing.

    Args: seconds: between two times.
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
        """There was work, which may have freed memory."""
        self._has_worked = True

    def turn(self) -> bool:
        """Give back what is free, if it is time. Returns: whether it was."""
        if self._trim is None or self.wait != 0.0:
            return False
        self._trim(0)
        self._next = time.monotonic() + self._seconds
        self._has_worked = False
        return True
