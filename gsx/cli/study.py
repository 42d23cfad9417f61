"""`gsx study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, quiet_libraries, table
from gsx.cli.reports import JsonOption, ModelArgument, PageOption, show
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx.workflows.study import StudyReport


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(study)


def study(
    model: ModelArgument,
    output: PageOption = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to study on.", show_default="a text that ships with gsx")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it to use.", show_default="2048")] = None,
    as_json: JsonOption = False,
) -> None:
    """How a model takes it when layers are left out: exits against skipped layers, and what each sequence would need.

    Example: gsx study examples/model -o out/study.html
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx.workflows.study import DEFAULT_TOKENS, study_model, write_study

        report = study_model(
            model,
            text=text,
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            on_progress=line.show,
        )
    show(report, as_json, _tables, output, write_study)


def _tables(report: StudyReport) -> None:
    from gsx.workflows.study import WORDS

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
