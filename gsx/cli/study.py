"""`gsx study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, quiet_libraries, table
from gsx.cli.options import SHIPPED_TEXT, JsonOption, ModelArgument, PageOption, TimeOption
from gsx.cli.reports import show
from gsx.cli.signals import loading
from gsx.defaults import STUDY_TOKENS

if TYPE_CHECKING:
    from gsx.workflows.study import StudyReport


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(study)


def study(
    model: ModelArgument,
    output: PageOption = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.", show_default=SHIPPED_TEXT)] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to use.")] = STUDY_TOKENS,
    time: TimeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what leaving out layers, or loops, costs, and how few of them each sequence of a text needs.

    Example: gsx study examples/model -o out/study.html
    """
    quiet_libraries()
    with ProgressLine(kept="no figures are kept: --time gives the best answer in a given time") as line:
        line.update("starting")
        with loading():
            from gsx import study as study_model

        report = study_model(
            model,
            text=text,
            tokens=tokens,
            seconds=time,
            on_progress=line.show,
        )
    show(report, as_json, _tables, output)


def _tables(report: StudyReport) -> None:
    from gsx.workflows.study import WORDS

    console = out()
    counts = sorted({point.layers for points in report.curves.values() for point in points}, reverse=True)
    found = {family: {point.layers: point.perplexity for point in points} for family, points in report.curves.items()}
    rows = [
        (str(count), *(f"{found[family][count]:.4g}" if count in found[family] else "-" for family in found))
        for count in counts
    ]
    console.print(f"{report.tokens:,} tokens in {report.sequences} sequences")
    greedy = report.curves.get("greedy")
    if greedy is not None and greedy[-1].layers > 1:
        console.print(f"The time was up: greedy sets are known down to {greedy[-1].layers} layers.")
    console.print(
        table(f"perplexity by {report.unit} kept", (report.unit, *(WORDS[family] for family in found)), rows, right=0)
    )
    oracle = [(f"{row.tolerance:g}", *(f"{share:.1%}" for share in row.shares.values())) for row in report.oracle]
    heads = ("nats per token above", *report.oracle[0].shares)
    console.print(report.sentence)
    console.print(table(f"fewest {report.unit} that a sequence needs, mean share", heads, oracle, right=0))
