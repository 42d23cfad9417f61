"""The report of `gsx bench`: as JSON, and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

from gsx.benchmarking.measure import Answers, Shape
from gsx.benchmarking.rounds import Spread, ratios, spread
from gsx.pages.figures import COLOURS, GREY, Plot, svg
from gsx.pages.render import write_page
from gsx_plugins.errors import GsxError

_Found = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Timing:
    """One kind of call of one form.

    Args:
        milliseconds: over the rounds.
        ratio: to the first form's time in the same round; below 1 is faster.
        left: the work of this call as a share of the first form's, which the time cannot fall below if nothing else
            changes; None with a draft.
    """

    milliseconds: Spread
    ratio: Spread
    left: float | None

    @property
    def over(self) -> float | None:
        """How much longer it takes than the work that is left, relative to that."""
        return None if self.left is None else self.ratio.median / self.left - 1


@dataclass(frozen=True)
class BenchRow:
    """A form at one shape of calls.

    Args:
        form: its name. bundle: its directory. setting: the keep settings in words. draft: the draft in use.
        prompt_tokens, batch: of the calls.
        rounds: how many counted.
        prompt_kept, kept: share of skippable work that ran, in prompts and for the tokens after them; None for a dense
            model and with a draft.
        first: of the prompts, until the first tokens are chosen; its work is floating-point operations.
        token: of each later token of all sequences together; its work is bytes. None without later tokens.
        tokens_per_second: new tokens of all sequences.
        accepted: tokens in a verification; None without a draft.
        peak_mb: peak memory of the bundle's process by the end of these calls.
        same_text: whether it wrote the tokens of the first form.
    """

    form: str
    bundle: str
    setting: str
    draft: str | None
    prompt_tokens: int
    batch: int
    rounds: int
    prompt_kept: float | None
    kept: float | None
    first: Timing
    token: Timing | None
    tokens_per_second: float | None
    accepted: float | None
    peak_mb: float
    same_text: bool


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
        return asdict(self)

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
        plot = Plot(
            "Time by work left",
            f"Each point is a setting at one length of prompt and one batch, relative to {self.base}; bars: smallest "
            "and largest ratio of a round. On the dashed line, time follows the work: floating-point operations of a "
            "prompt, bytes of a step.",
            svg((9.6, 4.2), 2, lambda axes: _draw(self, axes)),
        )
        shapes = [(shape, list(rows)) for shape, rows in groupby(self.rows, _shape)]
        write_page(path, "bench.html.j2", report=self, shapes=shapes, plot=plot)


def rows_of(shape: Shape, answers: Answers, labels: Mapping[str, tuple[str, str, str | None]]) -> list[BenchRow]:
    """The rows of one shape. Args: labels: of each form its bundle, setting and draft."""
    base = next(iter(answers.values()))
    rows = []
    for name, found in answers.items():
        token = _timing(found, base, "token", "bytes") if found[-1]["token"] is not None else None
        bundle, setting, draft = labels[name]
        rows.append(
            BenchRow(
                form=name,
                bundle=bundle,
                setting=setting,
                draft=draft,
                prompt_tokens=shape.prompt_tokens,
                batch=shape.batch,
                rounds=len(found),
                prompt_kept=found[-1]["prompt_kept"],
                kept=found[-1]["kept"],
                first=_timing(found, base, "first", "flops"),
                token=token,
                tokens_per_second=1000 * shape.batch / token.milliseconds.median if token else None,
                accepted=found[-1]["accepted"],
                peak_mb=found[-1]["peak_mb"],
                same_text=found[-1]["tokens"] == base[-1]["tokens"],
            )
        )
    return rows


def _timing(found: _Found, base: _Found, seconds: str, work: str) -> Timing:
    times, others = ([one[seconds] for one in answers] for answers in (found, base))
    mine, first = found[-1][work], base[-1][work]
    left = mine / first if mine is not None and first is not None else None
    return Timing(spread([1000 * one for one in times]), ratios(times, others), left)


def _shape(row: BenchRow) -> tuple[int, int]:
    return row.prompt_tokens, row.batch


def _draw(report: BenchReport, axes: list[Any]) -> None:
    shapes = list(dict.fromkeys(map(_shape, report.rows)))
    for axis, kind, title in zip(axes, ("first", "token"), ("first token", "later tokens"), strict=True):
        lefts = []
        for shape, colour in zip(shapes, cycle(COLOURS)):
            timings = [getattr(row, kind) for row in report.rows if _shape(row) == shape]
            points = [one for one in timings if one is not None and one.left is not None]
            lefts += [one.left for one in points]
            axis.errorbar(
                [one.left for one in points],
                [one.ratio.median for one in points],
                yerr=[
                    [one.ratio.median - one.ratio.least for one in points],
                    [one.ratio.most - one.ratio.median for one in points],
                ],
                fmt="o",
                markersize=3.5,
                linewidth=1,
                color=colour,
                label=str(Shape(shape[1], shape[0])),
            )
        ends = [min(lefts, default=0.0), max(lefts, default=1.0)]
        axis.plot(ends, ends, color=GREY, linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_xlabel("work left, relative")
    axes[0].set_ylabel("time, relative")
    axes[0].legend()
