"""Shared by all benchmarks: common options, tables in Markdown, and what must be recorded with a figure.

Rounds in turn and ratios are in `gsx/benchmarking/rounds.py`, which `gsx bench` uses too. Like that module, this one
needs only the standard library: some benchmarks run where nothing but PyTorch or llama.cpp is installed.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gsx.benchmarking.machine import machine

# Packages whose versions a figure may depend on.
PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "tensorrt", "tensorrt-rtx")


# -- options -----------------------------------------------------------------------------------------------------


def parser(
    name: str,
    doc: str | None,
    *,
    work: str | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    quick: Mapping[str, Any] | None = None,
) -> ArgumentParser:
    """The command line of a benchmark, with the options that several benchmarks have.

    Args:
        name: the module in `benchmarks`.
        doc: its docstring, shown as help.
        work: what `--work DIR` keeps there; None: no such option.
        rounds, threads: defaults of `--rounds` and `--threads`; None: no such option.
        quick: option names and the values that `--quick` gives them, besides one round.
    """
    made = ArgumentParser(f"python -m benchmarks.{name}", description=doc, formatter_class=RawDescriptionHelpFormatter)
    made.set_defaults(quick_values={**({} if rounds is None else {"rounds": 1}), **(quick or {})})
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that the benchmark runs")
    if work is not None:
        made.add_argument("--work", type=Path, required=True, metavar="DIR", help=f"directory for {work}; kept")
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds (default: {rounds})")
    if threads is not None:
        made.add_argument("--threads", type=int, default=threads, help=f"of each runtime (default: {threads})")
    return made


def parse(made: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Read the command line, and make the work directory. A given option takes precedence over `--quick`."""
    args = made.parse_args(arguments)
    if args.quick:
        made.set_defaults(**args.quick_values)
        args = made.parse_args(arguments)
    if getattr(args, "work", None) is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    return args


def print_header(made: ArgumentParser, args: Namespace, arguments: Sequence[str] | None) -> None:
    """Print what must be recorded with a figure: command, date, machine, versions."""
    work = str(getattr(args, "work", None))
    given = ["DIR" if word == work else word for word in (sys.argv[1:] if arguments is None else arguments)]
    print(f"    {made.prog} {shlex.join(given)}\n\n{date.today()}, {machine(PACKAGES)}.\n", flush=True)


# -- figures ------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def milliseconds(seconds: Sequence[float], digits: int = 1) -> str:
    """The median of seconds, as text in milliseconds."""
    return f"{1e3 * statistics.median(seconds):.{digits}f}"


class Table:
    """A table in Markdown, printed line by line as figures come in. Args: heads: names of the columns."""

    def __init__(self, *heads: str) -> None:
        self._columns = len(heads)
        self.row(*heads)
        print("|" + "---|" * len(heads), flush=True)

    def row(self, *cells: object) -> None:
        """Print a line. Args: cells: one per column; None is an empty cell."""
        if len(cells) != self._columns:
            raise ValueError(f"{len(cells)} cells for {self._columns} columns: {cells}")
        print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |", flush=True)
