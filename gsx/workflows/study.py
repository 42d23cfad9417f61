"""`gsx study`: what leaving out layers costs a model on a text, as tables and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsx.defaults import STUDY_TOKENS
from gsx.pages.charts import drawn_twice
from gsx.pages.figures import COLOURS, Plot, logarithmic, svg
from gsx.pages.render import write_page
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.layer_study import FAMILIES, Family, LayerSet, curves, oracle, study_loops
from gsx_exporter.layer_study import study as try_sets
from gsx_exporter.text import MIN_TOKENS, tokenize
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, silent

SEQUENCE_TOKENS = 128
# For the oracle: nats per token by which a sequence's loss may exceed the whole model's.
TOLERANCES = (0.0, 0.02, 0.05, 0.1, 0.2)
# Rises of perplexity that the answer names.
_RISES = (0.02, 0.1)
WORDS: dict[Family, str] = {
    "exit": "exit (the first layers)",
    "even": "even steps (unified)",
    "greedy": "greedy (least harm first)",
    "loops": "loops (the first ones)",
}


@dataclass(frozen=True)
class Point:
    """A set of layers: how many, which, and the perplexity with only these."""

    layers: int
    perplexity: float
    kept: LayerSet


@dataclass(frozen=True)
class OracleRow:
    """Share of the layers that sequences need on average, by the family of sets allowed; the last allows all sets."""

    tolerance: float
    shares: dict[str, float]


@dataclass(frozen=True)
class StudyReport:
    """The results of a study.

    Args:
        model: as it was given. depth: its layers; of a looped model, the visits of them.
        text: name of the text. sequences, tokens: their number in it.
        curves: by family, from all layers to few.
        oracle: by tolerance.
    """

    model: str
    depth: int
    text: str
    sequences: int
    tokens: int
    curves: dict[Family, list[Point]]
    oracle: list[OracleRow]

    @property
    def unit(self) -> str:
        """What sets consist of: layers, or visits of layers where these run several times."""
        return "visits" if "loops" in self.curves else "layers"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "answer": self.sentence,
            "model": self.model,
            "layers": self.depth,
            "text": {"name": self.text, "sequences": self.sequences, "tokens": self.tokens},
            "curves": {
                family: [{"layers": p.layers, "perplexity": p.perplexity, "kept": list(p.kept)} for p in points]
                for family, points in self.curves.items()
            },
            "oracle": [{"tolerance_nats": row.tolerance, "shares": row.shares} for row in self.oracle],
        }

    def write_page(self, path: str | Path) -> None:
        """Write the report as one HTML page.

        Raises:
            GsxError: the file cannot be written.
        """
        oracle = Plot(
            "What the oracle would keep",
            f"Share of {self.unit} that sequences need on average, by how much the loss of each may rise.",
            svg((7.2, 3.0), 1, lambda axes: _draw_oracle(self, axes[0]), label="What the oracle would keep"),
        )
        tips = {
            _tip_id(family, number): f"{WORDS[family]}, {point.layers} {self.unit}: perplexity {point.perplexity:.4g}"
            for family, points in self.curves.items()
            for number, point in enumerate(points)
        }
        picture = drawn_twice(lambda axis, _: _draw_curves(self, axis), self.sentence, heights=(3.6, 3.4), tips=tips)
        write_page(path, "study.html.j2", report=self, picture=picture, oracle=oracle, words=WORDS)

    @property
    def sentence(self) -> str:
        """The answer: how many layers may go, and how they are best chosen."""
        whole = next(iter(self.curves.values()))[0].perplexity
        parts = []
        for rise in _RISES:
            within = [
                (point.layers, point.perplexity, family)
                for family, points in self.curves.items()
                for point in points
                if point.perplexity <= (1 + rise) * whole
            ]
            layers, _, family = min(within)
            way = "" if layers == self.depth else f" ({family})"
            parts.append(f"{self.depth - layers} for at most {rise:.0%} more perplexity{way}")
        return f"Of {self.depth} {self.unit}, this text can do without {' and '.join(parts)}."


def study(
    model: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = STUDY_TOKENS,
    seconds: float | None = None,
    on_progress: OnProgress = silent,
) -> StudyReport:
    """Measure what leaving out layers, or loops, costs, and how few of them each sequence of a text needs.

    Args:
        model: a local model directory or a hub id.
        text: UTF-8 text file; None for the text that ships with gsx.
        tokens: how many of its tokens to use.
        seconds: about how long it may take: fewer tokens are used if they must be, and in the end the greedy sets stop
            before one layer. None for no limit.
        on_progress: called with the progress.
    Returns: perplexity by number of layers, for each way to select them; `write_page` writes it as one HTML page.
    Raises:
        GsxError: the model or the text cannot be used, or the model has only one layer or loop.
    Example:
        >>> report = gsx.study("my-model", tokens=512)
        >>> sorted(report.curves)
        ['even', 'exit', 'greedy']
        >>> report.write_page("out/study.html")
    """
    if tokens < MIN_TOKENS:
        raise UsageError("tokens to measure on", expected=f"at least {MIN_TOKENS}", found=str(tokens))
    checkpoint = open_checkpoint(model)
    loops, depth = checkpoint.config.loops, checkpoint.config.num_layers
    if (depth if loops is None else loops.most) < 2:
        what = "layers" if loops is None else "loops"
        raise UsageError(f"a study needs a model with several {what}", expected=f"2 {what} or more", found="1")
    found_text = tokenize(checkpoint, Path(text) if text else None, max_tokens=tokens, window=SEQUENCE_TOKENS)
    measure = try_sets if loops is None else study_loops
    found = measure(checkpoint, found_text.ids, on_progress, math.inf if seconds is None else seconds)
    sequences = len(found[0].nats)
    allowed: dict[str, Sequence[Family]] = {"loops": ("loops",)}
    if loops is None:
        allowed = {**{family: (family,) for family in FAMILIES}, "any": FAMILIES}
    return StudyReport(
        model=checkpoint.source,
        depth=depth,
        text=found_text.name,
        sequences=sequences,
        tokens=sequences * found_text.ids.shape[1],
        curves={family: [Point(*point) for point in points] for family, points in curves(found).items()},
        oracle=[
            OracleRow(tolerance, {name: oracle(found, tolerance, families).share for name, families in allowed.items()})
            for tolerance in TOLERANCES
        ],
    )


def _tip_id(family: Family, number: int) -> str:
    return f"{family}-{number}"


def _draw_curves(report: StudyReport, axis: Any) -> None:
    for (family, points), colour in zip(report.curves.items(), COLOURS, strict=False):
        axis.plot(
            [point.layers for point in points],
            [point.perplexity for point in points],
            linewidth=1,
            color=colour,
            label=WORDS[family],
        )
        for number, point in enumerate(points):
            (drawn,) = axis.plot([point.layers], [point.perplexity], "o", markersize=3.5, color=colour)
            drawn.set_gid(_tip_id(family, number))
    logarithmic(axis)
    axis.invert_xaxis()
    axis.set_xlabel(f"{report.unit} kept")
    axis.set_ylabel("perplexity")
    axis.legend()


def _draw_oracle(report: StudyReport, axis: Any) -> None:
    tolerances = [row.tolerance for row in report.oracle]
    for name, colour in zip(report.oracle[0].shares, COLOURS, strict=False):
        shares = np.array([row.shares[name] for row in report.oracle])
        axis.plot(tolerances, 100 * shares, marker="o", markersize=3, linewidth=1, color=colour, label=name)
    axis.set_ylim(0, 103)
    axis.set_xlabel("rise in loss that a sequence may have, nats per token")
    axis.set_ylabel(f"{report.unit}, percent")
    axis.legend()
