"""The report of `gsx compare`: as JSON, and as one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from gsx.comparison.front import front
from gsx.defaults import DIVERGENCE_LIMIT, INT4_DIVERGENCE_LIMIT
from gsx.pages.charts import Chart, Mark, scatter
from gsx.pages.figures import COLOURS, GREY, Plot, logarithmic, svg
from gsx.pages.render import write_page
from gsx.parity.estimate import Estimate

# Losses that the answer names, in nats: what 8 bits may cost, and what 4 bits may (`gsx verify`).
_LOSSES = (DIVERGENCE_LIMIT, INT4_DIVERGENCE_LIMIT)


@dataclass(frozen=True)
class Point:
    """One setting of one policy.

    Args:
        policy, setting: names.
        prompt_kept, kept: share of all (token, branch) pairs that ran, in prompts and in the tokens after them.
        perplexity: of the tokens after the prompts. divergence: mean KL divergence of their next-token distributions
            from the whole model's, in nats; differing: share of these whose most likely token is another one.
        prefill_ms: of a prompt, median of the rounds; prefill_ratio: over the whole model's, median of ratios within a
            round.
        token_ms, token_ratio: the same for a single token.
    """

    policy: str
    setting: str
    prompt_kept: float
    kept: float
    perplexity: float
    divergence: Estimate
    differing: Estimate
    prefill_ms: float
    prefill_ratio: float
    token_ms: float
    token_ratio: float


@dataclass(frozen=True)
class CompareReport:
    """All settings of all policies.

    Args:
        model: as it was given.
        text: name of the text. tokens: of it, measured. prompt_tokens, window_tokens: of each window.
        points: the first is the whole model.
        left_out: policy -> the reason.
    """

    model: str
    text: str
    tokens: int
    prompt_tokens: int
    window_tokens: int
    points: tuple[Point, ...]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"answer": self.sentence, **asdict(self)}

    def write_page(self, path: str | Path) -> None:
        """Write the report as one HTML page.

        Raises:
            GsxError: the file cannot be written.
        """
        plot = Plot(
            "Quality and time by share kept",
            "Each point is a setting; dashed: the whole model. Some policies run prompts in full.",
            svg((7.2, 8.4), 3, lambda axes: _draw(self, axes), rows=True, label="Quality and time by share kept"),
        )
        write_page(path, "compare.html.j2", report=self, plot=plot, picture=self._picture())

    @property
    def front(self) -> list[Point]:
        """The Pareto front of divergence and time per token, from the slowest to the fastest."""
        return front(self.points, lambda one: one.divergence.value, lambda one: one.token_ratio)

    @property
    def sentence(self) -> str:
        """The answer: what is fastest within two losses that people accept."""
        parts = []
        for loss in _LOSSES:
            within = [one for one in self.points[1:] if one.divergence.value <= loss and one.token_ratio < 1]
            best = min(within, key=lambda one: one.token_ratio, default=None)
            parts.append(
                f"within {loss:g} nats of the whole model "
                + (
                    "nothing makes tokens faster"
                    if best is None
                    else f"the fastest is {best.policy}, {best.setting}: {1 / best.token_ratio:.2f} times"
                )
            )
        text = "; ".join(parts) + "."
        return text[0].upper() + text[1:]

    def _picture(self) -> Chart:
        on_front = {id(point) for point in self.front}
        marks = [
            Mark(
                x=1 / point.token_ratio,
                y=point.divergence.value,
                group=point.policy,
                label=point.policy if point is self.points[0] else f"{point.policy}, {point.setting}",
                tip=f"{point.policy}, {point.setting}: {1 / point.token_ratio:.2f} times as fast a token, "
                f"{1 / point.prefill_ratio:.2f} a prompt, {point.divergence.value:.2g} nats, "
                f"{point.kept:.1%} kept",
                on_front=id(point) in on_front,
            )
            for point in self.points
        ]
        return scatter(
            marks,
            x="times as fast as the whole model, a token",
            y="KL divergence, nats",
            least=_LOSSES[0],
            lines=True,
            summary=f"Loss against measured speed of {len(marks)} settings. {self.sentence}",
        )


def _draw(report: CompareReport, axes: list[Any]) -> None:
    whole, *others = report.points
    panels = (
        ("perplexity", "kept", "perplexity"),
        ("prefill time, relative to the whole model", "prompt_kept", "prefill_ratio"),
        ("time per token, relative to the whole model", "kept", "token_ratio"),
    )
    for axis, (title, share, value) in zip(axes, panels, strict=True):
        axis.axhline(getattr(whole, value), color=GREY, linewidth=1, linestyle="--")
        for policy, colour in zip(dict.fromkeys(point.policy for point in others), cycle(COLOURS)):
            points = sorted((p for p in others if p.policy == policy), key=lambda point: getattr(point, share))
            axis.plot(
                [100 * getattr(point, share) for point in points],
                [getattr(point, value) for point in points],
                marker="o",
                markersize=3,
                linewidth=1,
                color=colour,
                label=policy,
            )
        axis.set_title(title)
    logarithmic(axes[0])
    axes[0].invert_xaxis()  # shared: as in the other reports, less is skipped on the left
    axes[0].legend()
    axes[-1].set_xlabel("(token, branch) pairs that run, percent (less is skipped on the left)")
