"""`gsx verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.options import SHIPPED_TEXT, BackendOptions, BundleArgument, JsonOption, grouped
from gsx.cli.signals import loading
from gsx.defaults import (
    DIVERGENCE_LIMIT,
    GREEDY_TOKENS,
    HALF_DIVERGENCE_LIMIT,
    QUALITY_LIMIT,
    QUALITY_TOKENS,
    SAMPLE_TOKENS,
    TOP1_LIMIT,
    VERIFY_TOKENS,
    WEIGHTS_DIVERGENCE_LIMIT,
)

if TYPE_CHECKING:
    from gsx.parity.report import Report

_STYLES = {"pass": "green", "fail": "bold red", "reported": "dim", "too few tokens": "yellow", "not judged": "yellow"}
_ROUNDED = "for what is rounded"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(verify))


@dataclass(frozen=True)
class QualityOptions:
    """Quality limits against full precision."""

    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(
            help="Largest relative change of perplexity, up or down.", show_default=f"{QUALITY_LIMIT} {_ROUNDED}"
        ),
    ] = None
    max_flipped: Annotated[
        float | None,
        typer.Option(help="Largest share of decisions that may differ.", show_default=f"{QUALITY_LIMIT} with 8 bits"),
    ] = None
    max_divergence: Annotated[
        float | None,
        typer.Option(
            help="Limit of the next-token distribution's KL divergence, in nats.",
            show_default=f"{DIVERGENCE_LIMIT} with 8 bits, {WEIGHTS_DIVERGENCE_LIMIT} if only of weights, "
            f"{HALF_DIVERGENCE_LIMIT} with 16",
        ),
    ] = None
    min_top1: Annotated[
        float | None,
        typer.Option(
            help="Share of tokens whose most likely next token must be the same.",
            show_default=f"{TOP1_LIMIT} {_ROUNDED}",
        ),
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
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of it to use.",
            show_default=f"{VERIFY_TOKENS}, with 8 bits {QUALITY_TOKENS}, of a sample {SAMPLE_TOKENS}",
        ),
    ] = None,
    greedy_tokens: Annotated[int, typer.Option(help="Length of the greedy continuation.")] = GREEDY_TOKENS,
    full: Annotated[
        bool, typer.Option("--full", help="Check every setting on the whole text, not only the exported one.")
    ] = False,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample", help="Check a few tokens, layer by layer: for bundles that are larger than the memory."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove that a bundle computes what PyTorch computes; exit code 1 if a check fails or cannot be decided.

    Writes parity.json and parity.html into the bundle.

    Example: gsx verify out/demo
    """
    quiet_libraries()
    with ProgressLine(kept=f"{bundle} and its last report are as they were") as line:
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
            full=full,
            sample=sample,
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
            row.interval,
            row.limit,
            Text(row.verdict, _STYLES[row.verdict]),
            row.tokens,
            row.setting,
            "" if row.verdict in ("pass", "reported") else row.detail,
        )
        for row in report.rows()
    ]
    columns = ["check", "worst", "95 % interval", "limit", "verdict", "tokens", "at", "where"]
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
    for doubt in report.doubts:
        console.print(Text(doubt, _STYLES["not judged"]))
    words = {"passed": "passed", "failed": "FAILED", "not decided": "NOT DECIDED"}
    console.print(f"{words[report.verdict]}: see {bundle / 'parity.html'}")
