"""`gsx compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, quiet_libraries, table
from gsx.cli.reports import JsonOption, ModelArgument, PageOption, show
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx.comparison.report import CompareReport


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(compare)


def compare(
    model: ModelArgument,
    output: PageOption = None,
    work: Annotated[Path, typer.Option(help="Folder for a bundle of each policy; what is there is used again.")] = Path(
        "gsx-compare"
    ),
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text: its first half calibrates, its second is measured.",
            show_default="a text that ships with gsx",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it to measure.", show_default="4096")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every policy that a model can have, side by side: perplexity and measured time against what is kept.

    Example: gsx compare examples/model -o out/compare.html
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx.comparison.report import write_comparison
            from gsx.workflows.compare import DEFAULT_TOKENS, compare_policies

        report = compare_policies(
            model,
            work,
            text=text,
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            on_progress=line.show,
        )
    show(report, as_json, _tables, output, write_comparison)


def _tables(report: CompareReport) -> None:
    console = out()
    rows = [
        (
            point.policy,
            point.setting,
            f"{point.kept:.1%}",
            f"{point.prompt_kept:.1%}",
            f"{point.perplexity:.4g}",
            f"{point.prefill_ms:.2f}",
            f"{point.prefill_ratio:.2f}",
            f"{point.token_ms:.2f}",
            f"{point.token_ratio:.2f}",
        )
        for point in report.points
    ]
    heads = ("policy", "setting", "kept", "of prompts", "perplexity", "prefill ms", "ratio", "token ms", "ratio")
    console.print(table(None, heads, rows, right=2))
    for name, why in report.left_out.items():
        console.print(f"left out: {name}. {why}")
