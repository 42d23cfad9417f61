"""A runtime in a process of its own, which answers one request at a time and stands still in between.

Of its own, so that its memory and its threads are its own. Still, because idle threads of a runtime may spin, which
doubles the time of the others. A process reads requests from standard input and writes answers to standard output, one
JSON value in a line; the first one is `"ready"`. Instead of an answer it may give `{"error": [what, expected, found,
todo]}`. `serve` is the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from gsx_plugins.errors import GsxError

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Worker:
    """A process that answers requests; a context manager, which ends it.

    Args:
        name: of what it runs, for messages.
        command: what to start.
        environment: its variables; None for those of this process.
    Raises:
        GsxError: it could not load what it runs.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, encoding="utf-8", env=environment
        )
        try:
            self._answer()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ask(self, request: Any) -> Any:
        """The answer to a request.

        Raises:
            GsxError: what the process reports, or that it has ended.
        """
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading its answer says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()  # also where it is stopped: it would not notice the end of its input
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        self._process.send_signal(signal.SIGSTOP)
        if isinstance(answer, dict) and "error" in answer:
            what, expected, found, todo = answer["error"]
            raise GsxError(what, expected=expected, found=found, todo=todo)
        return answer

    def _ended(self) -> GsxError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
        no_memory = "a system without memory kills: try fewer at once, shorter prompts or smaller batches"
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return GsxError(
            f"{self.name}: the process that measures it has ended",
            found=f"it ended {ended}{said}",
            todo=no_memory if code == -signal.SIGKILL else None,
        )


def serve(load: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer requests until standard input ends. Args: load: loads what answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which ends this one
    if sys.platform == "linux":  # and so does its death, which a stopped process would not notice
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # What a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = load()
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
    except GsxError as error:
        parts = [error.what, error.expected, error.found, error.todo]
        print(json.dumps({"error": parts}), file=answers, flush=True)
