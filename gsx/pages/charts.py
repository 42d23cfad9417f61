"""The picture that a report answers with: loss against speed, with the Pareto front drawn and labelled.

It is drawn twice, for a wide and a narrow screen, so that its text can be read on both. Each point has its figures as
an SVG title, which browsers show when the pointer rests on it, without a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from gsx.pages.figures import COLOURS, GREY, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE, _NARROW = (8.6, 4.2), (3.7, 4.4)
# Of the height of the chart; labels nearer to each other than this are moved apart.
_LABEL_HEIGHT = 0.055
_NARROW_LETTERS = 24


@dataclass(frozen=True)
class Mark:
    """A point.

    Args:
        x, y: where.
        group: points of a group share a colour.
        label: written beside it if it is on the front or chosen; tip: shown when the pointer rests on it.
        on_front: whether nothing else beats it in both; chosen: whether it is the answer.
    """

    x: float
    y: float
    group: str
    label: str
    tip: str
    on_front: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Chart:
    """The picture. Args: wide, narrow: SVG elements; summary: in words."""

    wide: str
    narrow: str
    summary: str


def chart(
    marks: Sequence[Mark], *, x: str, y: str, limit: float | None, summary: str, logarithmic: bool = False
) -> Chart:
    """Draw points.

    Args:
        x, y: what the axes show, with units.
        limit: a value of y to mark with a line.
        summary: for who cannot see it.
        logarithmic: whether y, which is above 0, grows by factors.
    """

    def drawn(size: tuple[float, float], letters: int | None) -> str:
        tips = {f"point-{number}": mark.tip for number, mark in enumerate(marks)}
        return svg(
            size,
            1,
            lambda axes: _draw(axes[0], marks, x, y, limit, letters, logarithmic),
            label=summary,
            tips=tips,
        )

    return Chart(drawn(_WIDE, None), drawn(_NARROW, _NARROW_LETTERS), summary)


def _draw(
    axis: Axes,
    marks: Sequence[Mark],
    x: str,
    y: str,
    limit: float | None,
    letters: int | None,
    logarithmic: bool,
) -> None:
    colours = dict(zip(dict.fromkeys(mark.group for mark in marks), cycle(COLOURS)))
    if logarithmic:
        from gsx.pages.figures import logarithmic as make

        make(axis)
    if limit is not None:
        axis.axhline(limit, color=GREY, linewidth=1, linestyle="--")
        axis.annotate(f"limit {limit:g}", (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    best = sorted((mark for mark in marks if mark.on_front), key=lambda mark: mark.x)
    axis.plot([mark.x for mark in best], [mark.y for mark in best], color=GREY, linewidth=1.2, drawstyle="steps-post")
    for number, mark in enumerate(marks):
        (point,) = axis.plot(
            [mark.x],
            [mark.y],
            marker="o",
            linestyle="",
            color=colours[mark.group],
            markersize=8 if mark.chosen else 5,
            markeredgewidth=1.6 if mark.chosen else 0,
            alpha=1.0 if mark.on_front or mark.chosen else 0.55,
        )
        point.set_gid(f"point-{number}")
    for group, colour in colours.items():
        axis.plot([], [], marker="o", linestyle="", color=colour, label=group)
    axis.margins(x=0.12, y=0.14)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2 if letters else 4)
    _label(axis, [mark for mark in marks if mark.on_front or mark.chosen], letters)


def _label(axis: Axes, marks: Sequence[Mark], letters: int | None) -> None:
    """Write labels beside their points, moved apart where they would cover each other."""
    place = axis.transData + axis.transAxes.inverted()
    taken: list[float] = []
    for mark in sorted(marks, key=lambda one: one.y):
        across, up = place.transform((mark.x, mark.y))
        while any(abs(up - other) < _LABEL_HEIGHT for other in taken):
            up += _LABEL_HEIGHT
        taken.append(up)
        left = across < 0.5
        text = mark.label if letters is None or len(mark.label) <= letters else mark.label[: letters - 1] + "…"
        axis.annotate(
            text,
            (mark.x, mark.y),
            xytext=(across + (0.02 if left else -0.02), up + 0.02),
            textcoords="axes fraction",
            ha="left" if left else "right",
            va="bottom",
            fontweight="bold" if mark.chosen else "normal",
        )
