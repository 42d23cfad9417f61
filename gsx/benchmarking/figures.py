"""The figures of the page of `gsx bench`: what is fastest, and whether time follows the work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Literal

from gsx.benchmarking.measure import Shape
from gsx.benchmarking.rows import BenchRow
from gsx.pages.charts import Chart, drawn_twice
from gsx.pages.figures import BLUE, COLOURS, GREY, ORANGE, Plot, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["first", "token"]
# In the order of the columns of the tables.
_KINDS: dict[Kind, str] = {"first": "first token", "token": "later tokens"}
_KIND_COLOURS: dict[Kind, str] = {"first": ORANGE, "token": BLUE}
# How far above its line a kind is drawn, in lines.
_UP: dict[Kind, float] = {"first": 0.12, "token": -0.12}
# Of a line with a setting, and of what is around them, in inches; letters that fit beside the narrow picture.
_LINE_HEIGHT, _AROUND, _NARROW_LETTERS = 0.3, 1.0, 16


# The rows of each shape of calls; the first row is what the others are compared with.
Shapes = Sequence[tuple[Shape, Sequence[BenchRow]]]


def speeds(rows: Sequence[BenchRow], summary: str) -> Chart:
    """How many times as fast as the first one each setting is, at one shape of calls; summary: in words."""
    tips = {f"{kind}-{n}": _tip(rows, row, kind) for n, row in enumerate(rows) for kind in _KINDS if getattr(row, kind)}
    height = _AROUND + _LINE_HEIGHT * len(rows)
    return drawn_twice(
        lambda axis, narrow: _draw_speeds(axis, rows, _NARROW_LETTERS if narrow else None),
        summary,
        heights=(height, height),
        tips=tips,
    )


def work_and_time(shapes: Shapes) -> Plot:
    """Time by work left, of all settings and shapes."""
    places = [
        (f"{kind}-work-{n}-{place}", kind, f"{shape}, {_tip(rows, row, kind)}")
        for kind in _KINDS
        for n, (shape, rows) in enumerate(shapes)
        for place, row in enumerate(rows)
        if getattr(row, kind) is not None
    ]
    return Plot(
        "Time by work left",
        f"Each point is a setting at one length of prompt and one batch, relative to {shapes[0][1][0].form}; bars: "
        "smallest and largest ratio of a round. On the dashed line, time follows the work: floating-point operations "
        "of a prompt, bytes of a step. Rest the pointer on a point for its figures.",
        svg(
            (9.6, 4.2),
            2,
            lambda axes: _draw_work(shapes, axes),
            label="Time by work left",
            tips={name: tip for name, _, tip in places},
        ),
    )


def _tip(rows: Sequence[BenchRow], row: BenchRow, kind: Kind) -> str:
    timing = getattr(row, kind)
    left = "" if timing.left is None else f", {timing.left:.3f} of the work"
    return (
        f"{row.form}, {_KINDS[kind]}: {timing.milliseconds.median:.2f} ms, {timing.ratio:.3f} of {rows[0].form}'s "
        f"time{left}"
    )


def _draw_speeds(axis: Axes, rows: Sequence[BenchRow], letters: int | None) -> None:
    axis.axvline(1, color=GREY, linewidth=1, linestyle="--")
    for kind, up in _UP.items():
        for number, row in enumerate(rows):
            timing = getattr(row, kind)
            if timing is None:
                continue
            colour, ratio = _KIND_COLOURS[kind], timing.ratio
            axis.plot([1 / ratio.most, 1 / ratio.least], [number - up] * 2, color=colour, linewidth=1.2)
            (point,) = axis.plot([1 / ratio.median], [number - up], marker="o", color=colour, markersize=5)
            point.set_gid(f"{kind}-{number}")
        axis.plot([], [], marker="o", linestyle="", color=_KIND_COLOURS[kind], label=_KINDS[kind])
    names = [row.form if letters is None or len(row.form) <= letters else row.form[: letters - 1] + "…" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"times as fast as {rows[0].form}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _draw_work(shapes: Shapes, axes: list[Axes]) -> None:
    for axis, (kind, title) in zip(axes, _KINDS.items(), strict=True):
        lefts = []
        for n, ((shape, rows), colour) in enumerate(zip(shapes, cycle(COLOURS))):
            for place, row in enumerate(rows):
                timing = getattr(row, kind)
                if timing is None or timing.left is None:
                    continue
                lefts.append(timing.left)
                axis.plot([timing.left] * 2, [timing.ratio.least, timing.ratio.most], color=colour, linewidth=1)
                (point,) = axis.plot([timing.left], [timing.ratio.median], marker="o", color=colour, markersize=4)
                point.set_gid(f"{kind}-work-{n}-{place}")
            axis.plot([], [], marker="o", linestyle="", color=colour, label=str(shape))
        ends = [min(lefts, default=0.0), max(lefts, default=1.0)]
        axis.plot(ends, ends, color=GREY, linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_xlabel("work left, relative")
    axes[0].set_ylabel("time, relative")
    axes[0].legend()
