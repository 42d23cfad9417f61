"""`gsx compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, quiet_libraries, table
from gsx.cli.options import HalvesOption, JsonOption, ModelArgument, PageOption, TimeOption
from gsx.cli.reports import show
from gsx.cli.signals import loading
from gsx.defaults import COMPARE_FOLDER, COMPARE_TOKENS

if TYPE_CHECKING:
    from gsx.comparison.report import CompareReport


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(compare)


def compare(
    model: ModelArgument,
    output: PageOption = None,
    work: Annotated[
        Path, typer.Option(help="Folder for one bundle per policy; bundles already there are reused.")
    ] = Path(COMPARE_FOLDER),
    text: HalvesOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to measure.")] = COMPARE_TOKENS,
    time: TimeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare all policies that a model supports: perplexity and measured time against the share kept.

    Example: gsx compare examples/model -o out/compare.html
    """
    quiet_libraries()
    with ProgressLine(kept=f"bundles stay in {work}: the same command uses them again") as line:
        line.update("starting")
        with loading():
            from gsx import compare as compare_policies

        report = compare_policies(
            model,
            work,
            text=text,
            tokens=tokens,
            seconds=time,
            on_progress=line.show,
        )
    show(report, as_json, _tables, output)


def _tables(report: CompareReport) -> None:
    console = out()
    rows = [
        (
            point.policy,
            point.setting,
            f"{point.kept:.1%}",
            f"{point.prompt_kept:.1%}",
            f"{point.divergence.value:.2g}",
            f"{1 - point.differing.value:.1%}",
            f"{point.perplexity:.4g}",
            f"{point.prefill_ms:.2f}",
            f"{point.prefill_ratio:.2f}",
            f"{point.token_ms:.2f}",
            f"{point.token_ratio:.2f}",
        )
        for point in report.points
    ]
    shares = ("kept", "of prompts", "KL, nats", "same next", "perplexity")
    heads = ("policy", "setting", *shares, "prefill ms", "ratio", "token ms", "ratio")
    console.print(table(None, heads, rows, right=2))
    for name, why in report.left_out.items():
        console.print(f"left out: {name}. {why}")
    console.print(report.sentence)
