"""`gsx bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, quiet_libraries, table
from gsx.cli.options import SHIPPED_TEXT, BackendOptions, BundleArgument, JsonOption, PageOption, grouped, time_option
from gsx.cli.reports import show
from gsx.cli.signals import loading
from gsx.defaults import BENCH_NEW_TOKENS, BENCH_PROMPT_TOKENS, BENCH_ROUNDS, BENCH_SECONDS

if TYPE_CHECKING:
    from gsx.benchmarking.report import BenchReport
    from gsx.benchmarking.rows import BenchRow, Timing


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(bench))


def bench(
    bundle: BundleArgument,
    backend: BackendOptions,
    others: Annotated[list[Path] | None, typer.Argument(help="Bundles to compare it with.", show_default=False)] = None,
    output: PageOption = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="budget:B, layers:SET, exit:E, speedup:R, exit-threshold:T or loops:N; may be given several times.",
            show_default="as gsx verify",
        ),
    ] = None,
    prompt_lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of the prompts, e.g. 32,512.", show_default=",".join(map(str, BENCH_PROMPT_TOKENS))),
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="Prompts that are continued together, e.g. 1,4.", show_default="1")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="New tokens of each prompt.")] = BENCH_NEW_TOKENS,
    rounds: Annotated[int, typer.Option(help="How often everything runs, at most.")] = BENCH_ROUNDS,
    seconds: Annotated[
        float | None,
        time_option("After it no further round begins", BENCH_SECONDS),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to take prompts from.", show_default=SHIPPED_TEXT)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the runtime.", show_default="the runtime's choice")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time bundles at their settings, next to each other: first token, tokens per second, memory, and the work left.

    All settings run in turn, and are compared with the first one within each round.

    Example: gsx bench out/demo --setting budget:1 --setting budget:0.5 -o out/bench.html
    """
    quiet_libraries()
    with ProgressLine(kept="no figures are kept: --time ends it sooner, with an answer") as line:
        line.update("starting")
        with loading():
            from gsx import bench as bench_bundles

        report = bench_bundles(
            bundle,
            *(others or ()),
            settings=setting or (),
            prompt_lengths=_numbers("--prompt-lengths", prompt_lengths) if prompt_lengths is not None else None,
            batches=_numbers("--batches", batches) if batches is not None else (1,),
            new_tokens=new_tokens,
            rounds=rounds,
            seconds=BENCH_SECONDS if seconds is None else seconds,
            text=text,
            threads=threads,
            **vars(backend),
            on_progress=line.show,
        )
    show(report, as_json, _tables, output)


def _numbers(option: str, text: str) -> list[int]:
    from gsx_plugins.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(option, expected="whole numbers between commas, e.g. 1,4", found=repr(text)) from error


def _tables(report: BenchReport) -> None:
    from gsx.benchmarking.report import fastest

    console = out()
    heads = ["setting", "kept", "of prompts", "first token, ms", "relative", "FLOPs left"]
    heads += ["tokens/s", "time, relative", "bytes left", "peak MB"]
    for shape, rows in report.shapes:
        title = f"{shape.prompt_tokens} tokens of prompt, {report.new_tokens} new ones, batch {shape.batch}"
        console.print(table(title, heads, [_cells(row) for row in rows], right=1))
        console.print(fastest(shape, rows))
    console.print(f"relative: to {report.base}, median of the rounds (smallest to largest)")
    for note in report.notes:
        console.print(note)


def _cells(row: BenchRow) -> tuple[str, ...]:
    token, speed = row.token, row.tokens_per_second
    name = row.form if row.accepted is None else f"{row.form} ({row.accepted:.2f} tokens a verification)"
    return (
        name,
        *("" if share is None else f"{share:.1%}" for share in (row.kept, row.prompt_kept)),
        f"{row.first.milliseconds.median:.1f}",
        f"{row.first.ratio:.3f}",
        _left(row.first),
        "" if speed is None else f"{speed:.1f}",
        "" if token is None else f"{token.ratio:.3f}",
        "" if token is None else _left(token),
        f"{row.peak_mb:.0f}",
    )


def _left(timing: Timing) -> str:
    return "" if timing.left is None else f"{timing.left:.3f}"
