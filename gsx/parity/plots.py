"""The figures of a parity report.

Each is a function that draws a report on the given axes, so that the page (SVG, in the page's own colours, light or
dark) and the combined figure (PNG) show the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gsx.pages.charts import Chart, drawn_twice
from gsx.pages.figures import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, Plot, style, svg
from gsx.parity.checks import Check
from gsx.parity.report import Report
from gsx.parity.result import BudgetResult
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.rules.settings import LayerCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Labels of points that are nearer than this would overlap.
_LABEL_PERCENT = 6.0
# A check that exceeds its limit is drawn up to so many times it; and letters of a check's name on a narrow screen.
_MOST_USED, _SHORT_LETTERS = 1.5, 26
_BRANCH_WORDS = {"attn": "attention", "mlp": "MLP"}


def page_plots(report: Report) -> list[Plot]:
    """All figures that this report has data for, for the HTML page."""
    limited = "With 8 bits it has no limit; quality has." if report.rounds else "The dashed line is the limit."
    plots = [
        Plot(
            "Error by layer",
            f"Largest difference over its own scale, on a logarithmic axis. {limited}",
            svg((10.2, 2.9), 3, lambda axes: errors_by_layer(report, axes)),
        )
    ]
    if len(report.results) > 1:
        plots.append(
            Plot(
                "Perplexity against share kept",
                "On the verification text, for reference and engine; "
                + ("with 8 bits they may differ up to the limit." if report.rounds else "the curves must coincide."),
                svg((5.2, 2.9), 1, lambda axes: perplexity(report, axes[0])),
            )
        )
    if report.branches and report.rounds:
        plots.append(
            Plot(
                "Flipped decisions by layer",
                "Share of tokens that are kept in 8 bits and skipped in full precision, or the reverse, in percent.",
                svg((10.2, 2.9), len(report.branches), lambda axes: flips_by_layer(report, axes)),
            )
        )
    if report.branches and len(report.results) > 1:
        height = 1.3 + 0.34 * len(report.results)
        plots.append(
            Plot(
                "Kept share by layer and branch",
                "Share of tokens that run each branch, in percent, at each setting.",
                svg((10.2, height), len(report.branches), lambda axes: kept_share(report, axes)),
            )
        )
    plots += [
        Plot(curve.title, curve.caption, svg((10.2, 2.6), 1, functools.partial(layer_curve, curve)))
        for curve in report.layer_curves
    ]
    if report.keep_map is not None:
        layers = len(report.keep_map.keep)
        height = 0.9 + len(report.branches) * (0.3 + 0.17 * layers)
        plots.append(
            Plot(
                "Which token keeps which layer",
                f"The beginning of the text at {report.keep_map.setting}: filled cells ran, faint "
                "ones were skipped. Layer 0 is at the bottom.",
                svg(
                    (10.2, height),
                    len(report.branches),
                    lambda axes: token_map(report, axes),
                    rows=True,
                ),
            )
        )
    return plots


def limits_used(report: Report) -> Chart | None:
    """The picture that the page answers with: how much of each limit is used; None if nothing has a limit."""
    worst: dict[str, Check] = {}
    for check in report.checks:
        if check.limit is not None and _used(check) >= _used(worst.get(check.name, check)):
            worst[check.name] = check
    checks = sorted(worst.values(), key=_used)
    if not checks:
        return None
    tips = {
        f"check-{number}": f"{check.name}, {check.setting}: {check.value:.3g}, limit {check.limit:.3g}, {check.verdict}"
        for number, check in enumerate(checks)
    }
    failed = sum(check.verdict == "fail" for check in checks)
    summary = f"Of {len(checks)} limits, {failed} are exceeded."
    height = 0.9 + 0.22 * len(checks)
    return drawn_twice(
        lambda axis, narrow: _bars(axis, checks, narrow), summary, heights=(height, height + 0.2), tips=tips
    )


def _used(check: Check) -> float:
    """The share of its limit that a check uses, up to what the picture shows; of a limit of 0, all or nothing."""
    assert check.limit is not None
    if not math.isfinite(check.value):
        return _MOST_USED
    used = abs(check.value) / check.limit if check.limit else _MOST_USED * (check.value != 0)
    return min(used, _MOST_USED)


def _bars(axis: Axes, checks: Sequence[Check], narrow: bool) -> None:
    colours = {"pass": GREEN, "fail": RED}
    for number, check in enumerate(checks):
        (bar,) = axis.barh(number, max(100 * _used(check), 0.6), height=0.6, color=colours.get(check.verdict, ORANGE))
        bar.set_gid(f"check-{number}")
    names = [check.name if not narrow else _short(check.name) for check in checks]
    axis.set_yticks(range(len(names)), names)
    axis.axvline(100, color=ORANGE, linewidth=1.2, linestyle="--")
    axis.set_xlim(0, 115 if all(_used(check) <= 1 for check in checks) else 100 * _MOST_USED)
    axis.set_xlabel("percent of the limit" if narrow else "share of the limit that the worst value uses, percent")
    axis.tick_params(length=0)


def _short(name: str) -> str:
    return name if len(name) <= _SHORT_LETTERS else name[: _SHORT_LETTERS - 1] + "…"


def combined(report: Report, path: Path) -> None:
    """Write one PNG with all figures, for a README."""
    layers = len(report.results[0].kept)
    gated = bool(report.branches)
    from matplotlib.figure import Figure

    rows = 0.9 + len(report.branches) * (0.3 + 0.17 * layers)
    with style("#22272e", "#d5dae0"):
        figure = Figure(figsize=(12.5, 6.3 + rows if gated else 3.2), layout="constrained", facecolor="white")
        if not gated:
            errors_by_layer(report, list(figure.subplots(1, 3, sharey=True)))
        else:
            parts: Any = figure.subfigures(3, 1, height_ratios=[3.0, 0.9 + 0.36 * len(report.results), rows])
            top, middle, bottom = parts
            errors_by_layer(report, list(top.subplots(1, 4, width_ratios=[1, 1, 1, 1.2])[:3]))
            perplexity(report, top.axes[3])
            top.axes[3].set_title("perplexity against share kept")
            kept_share(report, list(np.atleast_1d(middle.subplots(1, len(report.branches), sharey=True))))
            if report.keep_map is not None:
                token_map(report, list(np.atleast_1d(bottom.subplots(len(report.branches), 1, sharex=True))))
        figure.savefig(path, dpi=130)


def errors_by_layer(report: Report, axes: Sequence[Axes]) -> None:
    """Three panels: states, keys, values; one line per budget."""
    limits = [report.tolerances.relative_limit(result.rounding) for result in report.results]
    limit = min((value for value in limits if value is not None), default=None)
    shades = _shades(report)
    floor, top = (1.0, 1.0) if limit is None else (limit, limit)
    for axis, name in zip(axes, ("states", "keys", "values"), strict=True):
        for result, colour in zip(report.results, shades, strict=True):
            layers = getattr(result.windows, name)
            values = [max(layer.max_relative, 1e-9) if layer.usable else np.nan for layer in layers]
            floor = min([floor, *(v for v in values if np.isfinite(v))])
            axis.plot(
                range(len(values)),
                values,
                marker="o",
                markersize=3,
                linewidth=1,
                color=colour,
                label=result.setting,
            )
        if limit is not None:
            axis.axhline(limit, color=ORANGE, linewidth=1, linestyle="--")
        axis.set_yscale("log")
        axis.set_title(f"{name}: error by layer")
        axis.set_xlabel("layer")
        _whole_numbers(axis, len(report.results[0].kept))
    for axis in axes:
        axis.set_ylim(10 ** (np.floor(np.log10(floor)) - 1), top * 4)
    axes[0].set_ylabel("error over scale")
    if limit is not None:
        axes[0].text(0, limit * 1.25, "limit", color=ORANGE, fontsize=8)
    if len(report.results) > 1:
        axes[-1].legend(
            title="setting",
            fontsize=7,
            title_fontsize=7,
            columnspacing=1,
            handlelength=1.2,
            loc="lower center",
            ncols=5,
        )


def perplexity(report: Report, axis: Axes) -> None:
    """Reference and engine against the share that the reference kept of this text."""
    results = sorted(report.results, key=lambda result: -_kept(result))
    shares = [100 * _kept(result) for result in results]
    reference = np.exp([result.reference_nats for result in results])
    engine = np.exp([result.engine_nats for result in results])
    axis.plot(shares, reference, color=GREY, linewidth=3, label="reference")
    axis.plot(shares, engine, color=BLUE, marker="o", markersize=4, linewidth=1, label="engine")
    labelled = math.inf
    for result, share, value in zip(results, shares, engine, strict=True):
        if labelled - share < _LABEL_PERCENT:
            continue  # the next label would overlap this one
        labelled = share
        number = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
        axis.annotate(
            f"{result.setting}\n{number}",
            (share, value),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=6.5,
        )
    axis.margins(x=0.1, y=0.28)
    axis.invert_xaxis()
    axis.set_xlabel("share kept, percent (less is skipped on the left)")
    axis.set_ylabel("perplexity")
    axis.legend(loc="best")


def _kept(result: BudgetResult) -> float:
    return 1.0 if result.kept_share is None else result.kept_share


def layer_curve(curve: LayerCurve, axes: Sequence[Axes]) -> None:
    """A curve that the keep rule measured over the layers."""
    (axis,) = axes
    layers = len(curve.values)
    axis.plot(range(layers), curve.values, color=BLUE, marker="o", markersize=4, linewidth=1)
    for first, last in curve.shaded:
        axis.axvspan(first - 0.5, last + 0.5, color=GREY, alpha=0.2)
    if curve.line is not None:
        axis.axhline(curve.line, color=ORANGE, linewidth=1, linestyle="--")
    axis.set_xlim(-0.5, layers - 0.5)
    axis.set_ylabel(curve.label)
    axis.set_xlabel("layer")
    _whole_numbers(axis, layers)


def flips_by_layer(report: Report, axes: Sequence[Axes]) -> None:
    """One panel per branch; one line per budget."""
    for axis, branch in zip(axes, report.branches, strict=True):
        for result, colour in zip(report.results, _shades(report), strict=True):
            shares = [100 * row[BRANCHES.index(branch)] for row in result.quality.flipped]
            axis.plot(
                range(len(shares)),
                shares,
                marker="o",
                markersize=3,
                linewidth=1,
                color=colour,
                label=result.setting,
            )
        axis.set_title(f"{_BRANCH_WORDS[branch]}: decisions flipped, percent")
        axis.set_xlabel("layer")
        _whole_numbers(axis, len(report.results[0].kept))
    axes[-1].legend(title="setting", fontsize=7, title_fontsize=7)


def kept_share(report: Report, axes: Sequence[Axes]) -> None:
    """One heat map per branch: layers across, budgets down, shares as numbers."""
    results = report.results
    for axis, branch in zip(axes, report.branches, strict=True):
        shares = np.array([[row[BRANCHES.index(branch)] for row in result.kept] for result in results])
        axis.imshow(shares, cmap=_ramp(), vmin=0, vmax=1, aspect="auto")
        if shares.shape[1] <= 24:
            for (row, column), share in np.ndenumerate(shares):
                colour = "white" if share > 0.45 else "#1c2833"
                axis.text(column, row, f"{share * 100:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(f"{_BRANCH_WORDS[branch]}: tokens kept, percent")
        axis.set_xlabel("layer")
        axis.set_yticks(range(len(results)), [result.setting for result in results])
        _whole_numbers(axis, shares.shape[1])
        _bare(axis)
    axes[0].set_ylabel("setting")


def token_map(report: Report, axes: Sequence[Axes]) -> None:
    """One panel per branch: tokens across, layers up; a filled cell ran."""
    assert report.keep_map is not None
    layers = len(report.keep_map.keep)
    for axis, branch in zip(axes, report.branches, strict=True):
        column = BRANCHES.index(branch)
        keep = np.array([layer[column] for layer in report.keep_map.keep])
        _cells(axis, keep, BLUE if branch == "attn" else GREEN)
        axis.set_ylabel(_BRANCH_WORDS[branch])
        step = max(1, layers // 4)
        axis.set_yticks(range(0, layers, step))
        axis.set_xticks([])
        _bare(axis)
    labels = [_label(token) for token in report.keep_map.tokens]
    axes[-1].set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")


def _cells(axis: Axes, keep: np.ndarray, colour: str) -> None:
    """Draw kept cells as filled squares with a gap, skipped ones as faint outlines."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    def squares(where: np.ndarray) -> list[Any]:
        return [Rectangle((x - 0.44, y - 0.42), 0.88, 0.84) for y, x in zip(*np.nonzero(where), strict=True)]

    axis.add_collection(PatchCollection(squares(keep), facecolor=colour, edgecolor="none"))
    axis.add_collection(PatchCollection(squares(~keep), facecolor=GREY, alpha=0.16, edgecolor="none"))
    axis.set_xlim(-0.6, keep.shape[1] - 0.4)
    axis.set_ylim(-0.6, keep.shape[0] - 0.4)


def _label(token: str) -> str:
    shown = token.replace("\n", "⏎").replace("\t", "→").replace(" ", "·").replace("$", r"\$")
    return shown if len(shown) <= 10 else shown[:9] + "…"


def _shades(report: Report) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(report.results))]


def _ramp() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("gsx", ["#eef3f8", "#7fb2dc", "#2a6aa8", "#173f6b"])


def _whole_numbers(axis: Axes, count: int) -> None:
    axis.set_xticks(range(0, count, max(1, count // 8)))


def _bare(axis: Axes) -> None:
    axis.tick_params(length=0)
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
