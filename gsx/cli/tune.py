"""`gsx tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.export import default_output
from gsx.cli.options import HalvesOption, JsonOption, ModelArgument, OverwriteOption, time_option
from gsx.cli.signals import loading
from gsx.defaults import DIVERGENCE_LIMIT, TUNE_FOLDER, TUNE_NEW_TOKENS, TUNE_PROMPT_TOKENS, TUNE_SECONDS, TUNE_TOKENS

if TYPE_CHECKING:
    from gsx.tuning.report import TunePoint, TuneReport

PAGE = "tune.html"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(tune)


def tune(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Directory for the best bundle.", show_default="MODEL's name + -gsx"),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Largest mean KL divergence of next tokens from the whole model's, in nats.",
            show_default=f"{DIVERGENCE_LIMIT:g}, without --min-same",
        ),
    ] = None,
    min_same: Annotated[
        float | None,
        typer.Option(help="Least share of tokens whose most likely next token stays the same.", show_default="none"),
    ] = None,
    seconds: Annotated[
        float | None,
        time_option("About how long it may take", TUNE_SECONDS),
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for bundles, measurements and the page; what is there is used again.")
    ] = Path(TUNE_FOLDER),
    text: HalvesOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to measure.")] = TUNE_TOKENS,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt of the answers that are timed.")] = TUNE_PROMPT_TOKENS,
    new_tokens: Annotated[int, typer.Option(help="New tokens of these answers.")] = TUNE_NEW_TOKENS,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the fastest form of a model on this machine within a loss of quality, and write its bundle.

    Exit code 1 where nothing within the limit is faster than the whole model.

    Example: gsx tune examples/model --max-loss 0.02 --time 10m -o out/tuned --work out/tune
    """
    quiet_libraries()
    target = output if output is not None else default_output(model)
    with ProgressLine(kept=f"bundles and measurements stay in {work}: the same command goes on from there") as line:
        line.update("starting")
        with loading():
            from gsx import tune as tune_model

        report = tune_model(
            model,
            target,
            max_loss=max_loss,
            min_same=min_same,
            seconds=TUNE_SECONDS if seconds is None else seconds,
            work=work,
            text=text,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            overwrite=overwrite,
            on_progress=line.show,
        )
        report.write_page(work / PAGE)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report, work / PAGE)
    if report.best is None:
        raise typer.Exit(1)


def _print(report: TuneReport, page: Path) -> None:
    console = out()
    best = None if report.best is None else report.points[report.best]
    on_front = {id(point) for point in report.front}
    heads = ("form", "", "limit", "times as fast", "KL, nats", "same next", "first ms", "tokens/s", "weights MB")
    rows = [
        _cells(point, "best" if point is best else "front" if id(point) in on_front else "")
        for point in sorted(report.points[1:], key=lambda one: -one.speed if one.times else 1)
    ]
    console.print(table(None, heads, [_cells(report.points[0], "whole"), *rows], right=3))
    for name, why in report.left_out.items():
        console.print(f"left out: {name}. {why}")
    console.print(report.sentence)
    console.print(f"{'written to ' + report.output if report.output else 'nothing was written'}; the page is {page}")
    console.print(f"to repeat it: {report.command}")
    if report.output:
        console.print(f"to prove it:  gsx verify {report.output}")


def _cells(point: TunePoint, mark: str) -> tuple[str, ...]:
    times = point.times
    return (
        point.name,
        mark,
        point.verdict,
        "" if times is None else f"{point.speed:.2f} ({1 / times.ratio.most:.2f} to {1 / times.ratio.least:.2f})",
        f"{point.divergence.value:.2g} ({point.divergence.low:.1g} to {point.divergence.high:.1g})",
        f"{1 - point.differing.value:.1%}",
        "" if times is None else f"{times.first_ms:.1f}",
        "" if times is None else f"{1000 / times.token_ms:.1f}",
        f"{point.weights_mb:.1f}",
    )
