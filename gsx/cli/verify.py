"""`gsx verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx.parity.report import Report

_STYLES = {"pass": "green", "fail": "bold red", "reported": "dim"}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(verify)


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Option(help="The checkpoint to compare with.", show_default="the one that was exported"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to compare on.", show_default="a text that ships with gsx")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it to use.", show_default="1024")] = None,
    greedy_tokens: Annotated[
        int | None, typer.Option(help="Length of the greedy continuation.", show_default="256")
    ] = None,
    backend: Annotated[
        Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"],
        typer.Option(help="The runtime to prove; TensorRT runs what gsx build made, on a GPU."),
    ] = "onnxruntime",
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Where --backend torch runs.", show_default="a GPU if there is one"),
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(help="Relative limit against full precision.", show_default="0.01 for INT8 and FP8"),
    ] = None,
    max_flipped: Annotated[
        float | None,
        typer.Option(help="Share of decisions that may differ from full precision.", show_default="the same"),
    ] = None,
    max_divergence: Annotated[
        float | None, typer.Option(help="Limit of the next-token distribution's KL divergence, in nats.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Share of tokens whose most likely next token must be the same.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove that a bundle computes what PyTorch computes; exit code 1 where a check fails.

    Writes parity.json and parity.html into the bundle.

    Example: gsx verify out/demo
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx.parity.quality import QualityLimits
            from gsx.workflows.verify import DEFAULT_GREEDY_TOKENS, DEFAULT_TOKENS
            from gsx.workflows.verify import verify as verify_bundle

        report = verify_bundle(
            bundle,
            reference=reference,
            text=text,
            tokens=DEFAULT_TOKENS if tokens is None else tokens,
            greedy_tokens=DEFAULT_GREEDY_TOKENS if greedy_tokens is None else greedy_tokens,
            backend=backend,
            device=device,
            quality=QualityLimits(max_perplexity_increase, max_flipped, max_divergence, min_top1),
            on_progress=line.show,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report, bundle)
    if not report.passed:
        raise typer.Exit(1)


def _print(report: Report, bundle: Path) -> None:
    from rich.text import Text

    console = out()
    checks = [
        (
            row.name,
            row.value,
            row.limit,
            Text(row.verdict, _STYLES[row.verdict]),
            row.setting,
            row.detail if row.verdict == "fail" else "",
        )
        for row in report.rows()
    ]
    columns = ["check", "worst", "limit", "verdict", "at", "where"]
    if not any(row[-1] for row in checks):
        columns, checks = columns[:-1], [row[:-1] for row in checks]  # type: ignore[misc]
    console.print(table("engine against PyTorch", columns, checks))
    budgets = [
        (row.setting, row.kept, row.reference_perplexity, row.engine_perplexity, row.decisions, row.quality, row.tokens)
        for row in report.budget_rows()
    ]
    console.print(
        table(None, ("setting", "kept", "perplexity", "engine's", "decisions", "quality", "greedy tokens"), budgets)
    )
    for note in report.notes:
        console.print(note)
    console.print(f"{'passed' if report.passed else 'FAILED'}: {bundle / 'parity.html'} shows it")
