"""What commands print: results to stdout, progress and remarks to stderr.

Progress is a moving bar on a terminal and plain lines otherwise. Rich is imported when it is first needed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gsx.cli import signals
from gsx_plugins.progress import Progress, TimeLeft, in_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# In a log file, a line this often is enough to show that a step is still running.
_PLAIN_SECONDS = 10.0
_PIPE_COLUMNS = 400


def quiet_libraries() -> None:
    """Keep the chatter of torch, transformers and ONNX off the terminal, unless debugging."""
    if os.environ.get("GSX_DEBUG") == "1":
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def print_json(value: Any) -> None:
    """Print a value as JSON to stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    # In a file or a pipe, lines are practically never wrapped.
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def remark(text: str) -> None:
    """Print a line to stderr, dim on a terminal."""
    if sys.stderr.isatty():
        print(f"\033[2m{text}\033[0m", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, right: int = 99) -> Table:
    """A table; columns from index `right` on are right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number >= right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return result


def size(count: int) -> str:
    """A number of bytes with its unit, e.g. `1.5 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def _amount(count: int, progress: Progress) -> str:
    return size(count) if progress.unit == "bytes" else str(count)


class ProgressLine:
    """Progress of one long piece of work and the time left, on stderr; a context manager.

    Args:
        plain_every: seconds between plain lines of one stage, when stderr is not a terminal.
        kept: what an interruption leaves behind that is of use, to be said then.
    """

    def __init__(self, *, plain_every: float = _PLAIN_SECONDS, kept: str | None = None) -> None:
        self._kept = kept
        self._bar: Any = None
        self._task: Any = None
        self._stage: str | None = None
        self._last = 0.0
        self._plain_every = plain_every
        self._left = TimeLeft()

    def __enter__(self) -> ProgressLine:
        signals.keeps(self._kept)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[note]}", style="dim"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            signals.keeps(None)
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Show what a function reports to its `on_progress`."""
        stage, done, total, note = progress.stage, progress.done, progress.total, progress.note
        seconds = self._left.after(progress)
        left = "" if seconds is None else f"about {in_words(seconds)} left"
        count = f"{_amount(done, progress)}/{_amount(total, progress) if total else '?'}"
        fields = {"note": note, "left": left, "count": count}
        if self._bar is not None:
            if stage != self._stage:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(stage, total=total or None, **fields)
            self._bar.update(self._task, completed=done, total=total or None, **fields)
        else:
            now = time.monotonic()
            new = stage != self._stage
            if new or now - self._last >= self._plain_every or (total and done == total and note):
                shown = f" {count}" if total and (done or not new) else ""
                parts = [f"{stage}{shown}", *(part for part in (left, note) if part)]
                print("  ".join(parts), file=sys.stderr, flush=True)
                self._last = now
        self._stage = stage

    def update(self, stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """Show progress: `done` of `total` (0: unknown) in a stage, with a note."""
        self.show(Progress(stage, done, total, note))
