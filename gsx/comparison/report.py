"""The report of `gsx compare`: as JSON, and as one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from gsx.pages.figures import COLOURS, GREY, Plot, logarithmic, svg
from gsx.pages.render import write_page
from gsx.parity.estimate import Estimate


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
        return asdict(self)

    def write_page(self, path: str | Path) -> None:
        """Write the report as one HTML page.

        Raises:
            GsxError: the file cannot be written.
        """
        plot = Plot(
            "Quality and time by share kept",
            "Each point is a setting; dashed: the whole model. Some policies run prompts in full.",
            svg((7.2, 8.4), 3, lambda axes: _draw(self, axes), rows=True),
        )
        write_page(path, "compare.html.j2", report=self, plot=plot)


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
