"""Figures for a page, as SVG elements in the page's own colours, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Placeholders that are replaced with the page's own colours: `currentColor` follows its light or dark scheme.
_INK, _FAINT = "#010203", "#040506"
# Ids that Matplotlib gives to parts of a figure, the same in each.
_IDS, _QUOTE = "(?:figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend)", '"'
BLUE, ORANGE, GREEN, GREY, RED = "#3b82c4", "#e0803a", "#3d9970", "#8a94a0", "#c9566b"
# Of medium lightness, so that they are visible on light and dark pages.
COLOURS = (BLUE, GREEN, "#b8860b", RED, "#8b6fc0", GREY)


@dataclass(frozen=True)
class Plot:
    """A figure for the page: a heading, a caption, and the SVG element."""

    title: str
    caption: str
    svg: str


def style(ink: str, faint: str) -> Any:
    """A context manager with Matplotlib's settings for text and lines in these colours."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 8.5,
            "svg.fonttype": "none",
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.titlecolor": ink,
            "axes.titlesize": 9.5,
            "axes.edgecolor": faint,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": faint,
            "grid.linewidth": 0.5,
            "xtick.color": ink,
            "ytick.color": ink,
            "legend.frameon": False,
            "legend.fontsize": 8,
        }
    )


def logarithmic(axis: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as ticks even below a decade's range (40, not 4 x 10^1)."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def svg(
    size: tuple[float, float],
    panels: int,
    draw: Callable[[list[Axes]], None],
    *,
    rows: bool = False,
    label: str = "",
    tips: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Draw panels next to (or below) each other and return an SVG element in the page's colours.

    Args:
        label: what it shows, for who cannot see it.
        tips: id that `draw` gave an artist -> what the page shows when the pointer rests on it.
    """
    from matplotlib.figure import Figure

    # Ids are made from this and the content: two figures of a page must not share any.
    with style(_INK, _FAINT), _settings({"svg.hashsalt": f"{size} {label}"}):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        shape = (panels, 1) if rows else (1, panels)
        axes = figure.subplots(*shape, sharex=rows, sharey=not rows and panels > 1, squeeze=False)
        draw(list(axes.flat))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_FAINT, "var(--rule)")
    # Figures of a page have artists of the same names.
    unique = hashlib.sha256(f"{size} {label}".encode()).hexdigest()[:6]
    for name, tip in tips.items():
        text = text.replace(f'<g id="{name}">', f'<g id="{name}-{unique}" class="point"><title>{escape(tip)}</title>')
    text = re.sub(rf'id="({_IDS}[^"]*)"', rf'id="\1-{unique}"', text)
    # At most its natural size, so that text has the same size in all figures; smaller on a narrow screen.
    natural = f'style="width:100%;height:auto;max-width:{size[0] * 96:.0f}px"'
    named = f'role="img" aria-label="{escape(label, {_QUOTE: "&quot;"})}"' if label else 'aria-hidden="true"'
    pattern = r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"'
    return re.sub(pattern, lambda found: f"<svg {named} {found[1]}{found[2]}{natural}", text, count=1)


def _settings(values: dict[str, Any]) -> Any:
    import matplotlib

    return matplotlib.rc_context(values)
