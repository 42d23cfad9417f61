"""`gsx study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.signals import loading


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(study)


def study(
    model: Annotated[str, typer.Argument(help="A model directory or a hub id.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="HTML page to write.", show_default="none")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to study on.", show_default="a text that ships with gsx")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it to use.", show_default="2048")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """How a model takes it when layers are left out: exits against skipped layers, and what each sequence would need.

    Example: gsx study examples/model -o out/study.html
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx.study import DEFAULT_TOKENS, WORDS, study_model, write_study

        report = study_model(
            model,
            text=text,
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            on_progress=lambda progress: line.update(progress.stage, progress.done, progress.total),
        )
        if output is not None:
            write_study(report, output)
    if as_json:
        print_json(report.to_dict())
        return
    console = out()
    counts = sorted({point.layers for points in report.curves.values() for point in points}, reverse=True)
    found = {family: {point.layers: point.perplexity for point in points} for family, points in report.curves.items()}
    rows = [
        (str(count), *(f"{found[family][count]:.4g}" if count in found[family] else "-" for family in found))
        for count in counts
    ]
    console.print(table("perplexity by layers kept", ("layers", *(WORDS[family] for family in found)), rows, right=0))
    oracle = [(f"{row.tolerance:g}", *(f"{share:.1%}" for share in row.shares.values())) for row in report.oracle]
    heads = ("nats per token above", *report.oracle[0].shares)
    console.print(table("fewest layers that a sequence needs, mean share", heads, oracle, right=0))
    if output is not None:
        console.print(f"{output} shows it")
