"""The report of `gsx bench`: as JSON, and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from gsx.benchmarking.figures import speeds, work_and_time
from gsx.benchmarking.measure import Shape
from gsx.benchmarking.rows import BenchRow
from gsx.pages.render import write_page
from gsx_plugins.errors import GsxError


@dataclass(frozen=True)
class BenchReport:
    """What bundles take at all settings and shapes.

    Args:
        rows: by shape; the first form is what the others are compared with.
        new_tokens: of each sequence.
        threads: of the runtime; None for its own choice.
        backend: the runtime.
        text: name of the text that the prompts are from.
        date, machine: when and on what it was measured.
        notes: what was left out, and why.
    """

    rows: tuple[BenchRow, ...]
    new_tokens: int
    threads: int | None
    backend: str
    text: str
    date: str
    machine: str
    notes: tuple[str, ...]

    @property
    def base(self) -> str:
        """Name of the first form."""
        return self.rows[0].form

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"answer": self.sentence, **asdict(self)}

    def write_page(self, path: str | Path) -> None:
        """Write the report as one HTML page.

        Raises:
            GsxError: the file cannot be written, or what draws it is not installed.
        """
        missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
        if missing:
            raise GsxError(
                f"{path}: a page needs packages that are not installed",
                found=f"no {' and no '.join(missing)}",
                todo='pip install "gsx[export]"',
            )
        shapes = self.shapes
        picture, plot = speeds(shapes[0][1], self.sentence), work_and_time(shapes)
        write_page(path, "bench.html.j2", report=self, shapes=shapes, picture=picture, plot=plot, fastest=fastest)

    @property
    def shapes(self) -> list[tuple[Shape, list[BenchRow]]]:
        """The rows of each shape of calls, in order."""
        by_shape = groupby(self.rows, lambda row: Shape(row.batch, row.prompt_tokens))
        return [(shape, list(rows)) for shape, rows in by_shape]

    @property
    def sentence(self) -> str:
        """The answer, at the first shape."""
        return fastest(*self.shapes[0])


def fastest(shape: Shape, rows: Sequence[BenchRow]) -> str:
    """What is fastest at a shape, by later tokens if there are any."""
    base = rows[0]
    if len(rows) == 1:
        later = f" and {base.tokens_per_second:.1f} tokens/s" if base.tokens_per_second is not None else ""
        return f"{base.form} takes {base.first.milliseconds.median:.1f} ms to the first token of {shape}{later}."
    best = min(rows[1:], key=lambda row: (row.token or row.first).ratio.median)
    if (best.token or best.first).ratio.median >= 1:
        return f"With prompts of {shape}, nothing is faster than {base.form}."
    first = f"the first {1 / best.first.ratio.median:.2f} times as fast as {base.form}'s"
    later = f"later tokens {1 / best.token.ratio.median:.2f} times, " if best.token is not None else ""
    return f"With prompts of {shape}, the fastest is {best.form}: {later}{first}."
