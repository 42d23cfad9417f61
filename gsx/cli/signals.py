"""Ctrl-C and SIGTERM: a KeyboardInterrupt while there is something to clean up, an immediate end otherwise."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_SIGNAL = 128  # plus the signal's number, as shells count
INTERRUPTED = "interrupted: nothing was left half-written"
# An impatient second Ctrl-C must not interrupt the clean-up of the first.
_DEAF_SECONDS = 3.0
_SHOW_CURSOR = "\033[?25h"  # a progress bar hides it
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    received: int | None = None
    at = 0.0
    nothing_begun = False
    kept: str | None = None


def install() -> None:
    """Take over both signals; called before anything else is loaded."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """Ignore signals once the exit has begun: the command's results are complete."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_code() -> int:
    """The exit code of an interrupted command."""
    return EXIT_SIGNAL + (_State.received or signal.SIGINT)


def forget_ctrl_c() -> bool:
    """Go on after a Ctrl-C that ended a part of the work. Returns: False for a SIGTERM, which ends the command."""
    if _State.received != signal.SIGINT:
        return False
    _State.received = None
    return True


def keeps(what: str | None) -> None:
    """From now on, an interruption says that this was kept; None: nothing is."""
    _State.kept = what


def interrupted() -> str:
    """What to say of an interruption."""
    return INTERRUPTED if _State.kept is None else f"{INTERRUPTED}; {_State.kept}"


@contextmanager
def loading() -> Iterator[None]:
    """While libraries are imported: a signal ends the process at once.

    Nothing has been written yet, and an exception while torch is loading makes it abort with a dump.
    """
    _State.nothing_begun = True
    try:
        yield
    finally:
        _State.nothing_begun = False


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _State.nothing_begun:
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        os.write(2, f"{cursor}{INTERRUPTED}\n".encode())
        os._exit(EXIT_SIGNAL + number)
    now = time.monotonic()
    if _State.received is not None and now - _State.at < _DEAF_SECONDS:
        return
    _State.received, _State.at = number, now
    raise KeyboardInterrupt
