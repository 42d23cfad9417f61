"""`gsx compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.signals import loading


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(compare)


def compare(
    model: Annotated[str, typer.Argument(help="A model directory or a hub id.", show_default=False)],
    work: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for compare.html and a bundle of each policy.")
    ] = Path("gsx-compare"),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to score.", show_default="a text that ships with gsx")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it to use.", show_default="2048")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Every policy that applies to a checkpoint: perplexity and measured time against what is kept.

    Example: gsx compare examples/model -o out/compare
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx.compare import DEFAULT_TOKENS, write_comparison
            from gsx.compare import compare as compare_policies

        report = compare_policies(
            model,
            work,
            text=text,
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            on_progress=lambda progress: line.update(progress.stage, progress.done, progress.total),
        )
        write_comparison(report, work / "compare.html")
    if as_json:
        print_json(report.to_dict())
        return
    rows = [
        (
            point.policy,
            point.setting,
            f"{point.kept_share:.1%}",
            f"{point.perplexity:.4g}",
            f"{point.prefill_ms:.1f}",
            f"{point.prefill_ratio:.2f}",
            f"{point.decode_ms:.2f}",
            f"{point.decode_ratio:.2f}",
        )
        for point in report.points
    ]
    heads = ("policy", "setting", "kept", "perplexity", "prefill ms", "share", "token ms", "share")
    console = out()
    console.print(table(None, heads, rows, right=2))
    for name, why in report.left_out.items():
        console.print(f"{name} is left out: {why}")
    console.print(f"{work / 'compare.html'} shows it")
