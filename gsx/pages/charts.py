"""The picture that a report answers with: loss against speed, with the Pareto front drawn and labelled.

It is drawn twice, for a wide and a narrow screen, so that its text can be read on both. Each point has its figures as
an SVG title, which browsers show when the pointer rests on it, without a script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import MappingProxyType
from typing import TYPE_CHECKING

from gsx.pages.figures import COLOURS, GREY, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE, _NARROW = (8.6, 4.2), (3.7, 4.4)
# Of the height of the chart: labels nearer to each other than this are moved apart. Of its width: from point to label.
_LABEL_HEIGHT = 0.055
_LABEL_GAP = 0.025
_NARROW_LETTERS = 24
# Ticks of a loss.
_STEPS = tuple(step * 10.0**power for power in range(-4, 3) for step in (1, 2, 5))


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


def drawn_twice(
    draw: Callable[[Axes, bool], None],
    summary: str,
    *,
    heights: tuple[float, float] = (_WIDE[1], _NARROW[1]),
    tips: Mapping[str, str] = MappingProxyType({}),
) -> Chart:
    """A picture for both screens.

    Args:
        draw: draws it; told whether it is the narrow one.
        summary: for who cannot see it.
        heights: of the wide and the narrow one, in inches.
        tips: as for `svg`.
    """

    def drawn(width: float, height: float, narrow: bool) -> str:
        return svg((width, height), 1, lambda axes: draw(axes[0], narrow), label=summary, tips=tips)

    return Chart(drawn(_WIDE[0], heights[0], False), drawn(_NARROW[0], heights[1], True), summary)


def scatter(
    marks: Sequence[Mark],
    *,
    x: str,
    y: str,
    summary: str,
    limit: float | None = None,
    least: float,
    lines: bool = False,
) -> Chart:
    """Draw points by speed and loss.

    Args:
        x, y: what the axes show, with units.
        limit: a loss to mark with a line.
        summary: for who cannot see it.
        least: losses above it are drawn by factors, those below it evenly, down to 0.
        lines: whether the points of a group are joined.
    """
    tips = {f"point-{number}": mark.tip for number, mark in enumerate(marks)}
    return drawn_twice(
        lambda axis, narrow: _draw(axis, marks, x, y, limit, _NARROW_LETTERS if narrow else None, least, lines),
        summary,
        tips=tips,
    )


def _draw(
    axis: Axes,
    marks: Sequence[Mark],
    x: str,
    y: str,
    limit: float | None,
    letters: int | None,
    least: float,
    lines: bool,
) -> None:
    colours = dict(zip(dict.fromkeys(mark.group for mark in marks), cycle(COLOURS)))
    _by_factors(axis, [mark.y for mark in marks], least)
    if limit is not None:
        axis.axhline(limit, color=GREY, linewidth=1, linestyle="--")
        word = axis.annotate(
            f"limit {limit:g}", (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
        word.set_in_layout(False)
    for group in colours if lines else ():
        joined = sorted((mark for mark in marks if mark.group == group), key=lambda mark: mark.y)
        axis.plot([m.x for m in joined], [m.y for m in joined], color=colours[group], linewidth=0.9, alpha=0.6)
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
    axis.margins(x=0.12)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2 if letters else 4)
    _label(axis, [mark for mark in marks if mark.on_front or mark.chosen], letters)


def _by_factors(axis: Axes, values: Sequence[float], least: float) -> None:
    """A y axis that grows by factors above `least`, with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_yscale("symlog", linthresh=least, linscale=0.6)
    top = max([least, *values])
    ticks = [0.0, *(step for step in _STEPS if least <= step <= 1.5 * top)]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(-0.25 * least, 1.6 * top)


def _label(axis: Axes, marks: Sequence[Mark], letters: int | None) -> None:
    """Write labels beside their points, moved apart where they would cover each other."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the limits and the layout, which labels do not change
    place = axis.transData + axis.transAxes.inverted()
    taken: list[float] = []
    for mark in sorted(marks, key=lambda one: one.y):
        across, up = place.transform((mark.x, mark.y))
        height = up
        while any(abs(height - other) < _LABEL_HEIGHT for other in taken):
            height += _LABEL_HEIGHT
        taken.append(height)
        left = across > 0.5
        text = mark.label if letters is None or len(mark.label) <= letters else mark.label[: letters - 1] + "…"
        moved = height - up > _LABEL_HEIGHT / 2
        label = axis.annotate(
            text,
            (mark.x, mark.y),
            xytext=(across + (-_LABEL_GAP if left else _LABEL_GAP) * (2 if moved else 1), height),
            textcoords="axes fraction",
            ha="right" if left else "left",
            va="center",
            fontweight="bold" if mark.chosen else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if moved else None,
        )
        label.set_in_layout(False)
