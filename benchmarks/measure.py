"""Shared by all benchmarks: common options, rounds in turn, ratios, and tables in Markdown.

The machines that we measure on change speed from minute to minute, so only ratios are worth recording. All variants run
in turn within a round; a ratio is taken within each round; its median over the rounds is reported with the smallest and
the largest one. (pyperf runs each benchmark in a process and at a time of its own, so it cannot pair them.)

This module imports only the standard library: some benchmarks run where nothing but PyTorch or llama.cpp is installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

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
    print(f"    {made.prog} {shlex.join(given)}\n\n{date.today()}, {machine()}.\n", flush=True)


def machine() -> str:
    """Processor, memory, GPU, system and versions, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{cores} cores of {_processor()}", f"{gib:.0f} GiB", *_gpus()]
    parts += [f"{platform.system()} {platform.release()}", f"Python {platform.python_version()}"]
    return ", ".join([*parts, *(f"{name} {found}" for name in PACKAGES if (found := _version(name)))])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Names of the GPUs, if the benchmark has loaded PyTorch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# -- rounds ------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def repeated(one_round: Callable[[], T], rounds: int) -> list[T]:
    """The result of each round. One more round runs first and does not count: it loads code and memory."""
    one_round()
    return [one_round() for _ in range(rounds)]


def in_turn(names: Iterable[str], run: Callable[[str], T], rounds: int) -> dict[str, list[T]]:
    """Run all forms once in each round.

    The order is reversed from round to round, since what runs before a form may slow it down.

    Args: names: the forms' names; run: runs one form, and returns its figures.
    Returns: name -> what `run` returned, one entry per round; entries at the same index are of the same round.
    """
    forms = list(names)
    order = list(names)

    def one_round() -> dict[str, T]:
        order.reverse()
        return {name: run(name) for name in order}

    found = repeated(one_round, rounds)
    return {name: [one[name] for one in found] for name in forms}


# -- figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values, one per round."""

    median: float
    least: float
    most: float

    def __format__(self, spec: str) -> str:
        """E.g. `f"{spread:.2f}"`: `1.20 (1.15 to 1.49)`, or only the median where all are equal."""
        if self.least == self.most:
            return format(self.median, spec)
        return f"{self.median:{spec}} ({self.least:{spec}} to {self.most:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of values, one per round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """The spread of `values` over `base`, each divided by the base's value of the same round."""
    return spread([value / one for value, one in zip(values, base, strict=True)])


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
