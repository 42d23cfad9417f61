"""`gsx verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.options import SHIPPED_TEXT, BackendOptions, BundleArgument, JsonOption, grouped
from gsx.cli.signals import loading
from gsx.defaults import GREEDY_TOKENS, QUALITY_LIMIT, VERIFY_TOKENS

if TYPE_CHECKING:
    from gsx.parity.report import Report

_STYLES = {"pass": "green", "fail": "bold red", "reported": "dim"}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(verify))


@dataclass(frozen=True)
class QualityOptions:
    """Quality limits against full precision."""

    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(help="Largest relative rise in perplexity.", show_default=f"{QUALITY_LIMIT} for INT8 and FP8"),
    ] = None
    max_flipped: Annotated[
        float | None,
        typer.Option(
            help="Largest share of decisions that may differ.", show_default=f"{QUALITY_LIMIT} for INT8 and FP8"
        ),
    ] = None
    max_divergence: Annotated[
        float | None, typer.Option(help="Limit of the next-token distribution's KL divergence, in nats.")
    ] = None
    min_top1: Annotated[
        float | None, typer.Option(help="Share of tokens whose most likely next token must be the same.")
    ] = None


def verify(
    bundle: BundleArgument,
    backend: BackendOptions,
    quality: QualityOptions,
    reference: Annotated[
        str | None,
        typer.Option(help="The checkpoint to compare with.", show_default="the one that was exported"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to compare on.", show_default=SHIPPED_TEXT)] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to use.")] = VERIFY_TOKENS,
    greedy_tokens: Annotated[int, typer.Option(help="Length of the greedy continuation.")] = GREEDY_TOKENS,
    as_json: JsonOption = False,
) -> None:
    """Prove that a bundle computes what PyTorch computes; exit code 1 if a check fails.

    Writes parity.json and parity.html into the bundle.

    Example: gsx verify out/demo
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx import QualityLimits
            from gsx import verify as verify_bundle

        report = verify_bundle(
            bundle,
            reference=reference,
            text=text,
            tokens=tokens,
            greedy_tokens=greedy_tokens,
            quality=QualityLimits(
                quality.max_perplexity_increase, quality.max_flipped, quality.max_divergence, quality.min_top1
            ),
            **vars(backend),
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
    console.print(f"{'passed' if report.passed else 'FAILED'}: see {bundle / 'parity.html'}")
