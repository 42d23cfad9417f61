"""The `gsx` command: its entry point, and how errors of all commands are reported.

Nothing heavy is imported here. Signals are turned into exceptions before anything else is loaded, so that
Ctrl-C ends with one line at any moment; the workflows clean up after themselves.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from gsx.cli import signals

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_PIPE = signals.EXIT_SIGNAL + 13  # SIGPIPE


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    signals.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character still shows the rest
            stream.reconfigure(errors="replace")
    code = run(sys.argv[1:])
    signals.ignore()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        _silence_output()
        code = code or EXIT_PIPE
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Errors are printed to stderr, never raised."""
    try:
        with signals.loading():
            from gsx.cli.app import command

            app = command()
        code = app.main(args=list(arguments), prog_name="gsx", standalone_mode=False)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    except BaseException as error:
        return _report(error)
    if code == signals.EXIT_SIGNAL + signal.SIGINT:  # what Typer makes of a KeyboardInterrupt
        return _report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def _report(error: BaseException) -> int:
    """Print an error in the form for its kind; returns the exit code."""
    from gsx_plugins.errors import GsxError

    if os.environ.get("GSX_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        _say(signals.interrupted())
        return signals.exit_code()
    if isinstance(error, GsxError):
        _say(error.message)
        return error.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, which Typer may vendor
        return _usage(error)
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE:
            _silence_output()
            return EXIT_PIPE
        place = f"{error.filename}: " if error.filename else ""
        _say(f"{place}{error.strerror or error}")
        return EXIT_FAILED
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        _say("out of memory\n  use a smaller model, fewer --calibration-tokens, or a machine with more memory")
        return EXIT_FAILED
    _say(
        f"this is a bug in gsx: {type(error).__name__}: {_first_line(error)}\n"
        "  run it again with GSX_DEBUG=1 for the traceback, and report both with the output of `gsx doctor`"
    )
    return EXIT_BUG


def _usage(error: BaseException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "gsx"
    message = error.format_message()  # type: ignore[attr-defined]
    _say(f"{path}: {message}\n  `{path} --help` shows the usage")
    return EXIT_USAGE


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody is there to read it
        _silence_output()


def _silence_output() -> None:
    """The reader is gone: let the flush at exit write to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())
