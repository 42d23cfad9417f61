"""The report of `gsx tune`: as JSON, and as one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gsx.benchmarking.rounds import Spread
from gsx.comparison.front import front
from gsx.comparison.options import ExportOptions
from gsx.pages.charts import Chart, Mark, scatter
from gsx.pages.render import write_page
from gsx.parity.estimate import Estimate
from gsx.tuning.limit import Limit
from gsx_engines.bundle.controls import KeepSettings

PointVerdict = Literal["within", "over", "too few tokens", "lost early"]


@dataclass(frozen=True)
class Times:
    """How long an answer takes.

    Args:
        first_ms: to the first token, and token_ms: for each later one; medians of the rounds.
        ratio: of the whole answer, to the whole model's in the same round; below 1 is faster. rounds: how many.
        peak_mb: peak memory of the process.
    """

    first_ms: float
    token_ms: float
    ratio: Spread
    rounds: int
    peak_mb: float


@dataclass(frozen=True)
class TunePoint:
    """A bundle at a setting.

    Args:
        options: what it was exported with. keep: what requests ask for; setting: in words.
        prompt_kept, kept: share of all (token, branch) pairs that ran, in prompts and in the tokens after them.
        divergence: mean KL divergence of the next-token distributions from the whole model's, in nats.
        differing: share of tokens whose most likely next token is another one.
        verdict: against the limit; `lost early` if the first part of the text showed that it is far over it.
        weights_mb: size of the weights' file.
        times: None if it was not timed: it is too far over the limit.
    """

    options: ExportOptions
    keep: KeepSettings
    setting: str
    prompt_kept: float
    kept: float
    divergence: Estimate
    differing: Estimate
    verdict: PointVerdict
    weights_mb: float
    times: Times | None = None

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return f"{self.options.name}, {self.setting}" if self.setting else self.options.name

    @property
    def speed(self) -> float:
        """How many times as fast as the whole model it is, as a whole answer; NaN if it was not timed."""
        return float("nan") if self.times is None else 1 / self.times.ratio.median


@dataclass(frozen=True)
class TuneReport:
    """What was tried, and what is best.

    Args:
        model: as it was given.
        limit: of the loss.
        text: name of the text. tokens: of it, scored at most.
        prompt_tokens, new_tokens: of the answers that were timed.
        points: the first is the whole model.
        best: index of the fastest point within the limit; None if none is faster than the whole model.
        command: the `gsx export` that makes the best bundle; for None, the one nearest to the limit.
        output: the best bundle's directory; None if nothing was written.
        left_out: what was not tried -> the reason.
        work: the work folder. taken_over: measurements of earlier runs in it that this one used.
        seconds: how long it took.
        date, machine: when and on what it was measured.
    """

    model: str
    limit: Limit
    text: str
    tokens: int
    prompt_tokens: int
    new_tokens: int
    points: tuple[TunePoint, ...]
    best: int | None
    command: str
    output: str | None
    left_out: dict[str, str]
    work: str
    taken_over: int
    seconds: float
    date: str
    machine: str

    @property
    def by_tokens(self) -> bool:
        """Whether the loss is counted in next tokens that differ, and not in nats."""
        return self.limit.divergence is None

    def loss(self, point: TunePoint) -> float:
        """The loss in the limit's unit: nats, or the share of next tokens that differ."""
        return point.differing.value if self.by_tokens else point.divergence.value

    @property
    def front(self) -> list[TunePoint]:
        """The Pareto front of the timed points, from the slowest to the fastest."""
        timed = [point for point in self.points if point.times is not None]
        return front(timed, self.loss, lambda point: 1 / point.speed)

    @property
    def nearest(self) -> TunePoint | None:
        """Of the points that are faster than the whole model and over the limit, the one that is least over it."""
        faster = [point for point in self.points[1:] if point.times is not None and point.speed > 1]
        return min(faster, key=lambda one: self.limit.times(one.divergence, one.differing), default=None)

    @property
    def sentence(self) -> str:
        """The answer."""
        if self.best is None:
            if self.nearest is None:
                return f"Nothing that was tried is faster than the whole model with {self.limit}."
            return (
                f"Nothing faster than the whole model has {self.limit}. The nearest is {self.nearest.name}: "
                f"{self._figures(self.nearest)}, {self._times_over(self.nearest)}."
            )
        best = self.points[self.best]
        return f"{best.name}: {self._figures(best)} (limit: {self.limit})."

    def _times_over(self, point: TunePoint) -> str:
        if point.verdict == "too few tokens":
            return "but too few tokens were scored to tell whether it is within the limit"
        return f"{self.limit.times(point.divergence, point.differing):.2g} times the limit"

    def _figures(self, point: TunePoint) -> str:
        return (
            f"{point.speed:.2f} times as fast as the whole model, {point.divergence.value:.2g} nats off, "
            f"{1 - point.differing.value:.1%} of next tokens the same"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        on_front = {id(point) for point in self.front}
        values = asdict(self)
        for point, plain in zip(self.points, values["points"], strict=True):
            plain |= {"name": point.name, "on_front": id(point) in on_front}
        return {"answer": self.sentence, **values}

    def write_page(self, path: str | Path) -> None:
        """Write the report as one HTML page.

        Raises:
            GsxError: the file cannot be written.
        """
        write_page(path, "tune.html.j2", report=self, picture=self._chart())

    def _chart(self) -> Chart:
        on_front = {id(point) for point in self.front}
        best = None if self.best is None else self.points[self.best]
        marks = [
            Mark(
                x=point.speed,
                y=self.loss(point),
                group=point.options.scheme or "full precision",
                label="whole model" if point is self.points[0] else point.name,
                tip=f"{point.name}: {self._figures(point)}",
                on_front=id(point) in on_front,
                chosen=point is best,
            )
            for point in self.points
            if point.times is not None
        ]
        most = self.limit.divergence if not self.by_tokens else None
        if self.by_tokens and self.limit.same is not None:
            most = 1 - self.limit.same
        assert most is not None
        return scatter(
            marks,
            x="times as fast as the whole model",
            y="next tokens that differ, share" if self.by_tokens else "KL divergence, nats",
            limit=most,
            least=most / 4,
            summary=f"Loss against speed of {len(marks)} settings. {self.sentence}",
        )
