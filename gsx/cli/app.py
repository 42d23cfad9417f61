"""The commands of `gsx`, one module each; this file only collects them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.main import get_command

from gsx.cli import (
    bench,
    build,
    compare,
    convert,
    doctor,
    export,
    generate,
    inspect,
    plugins,
    serve,
    study,
    train,
    triton,
    tune,
    verify,
)

app = typer.Typer(
    name="gsx",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    export,
    build,
    verify,
    generate,
    bench,
    inspect,
    tune,
    study,
    compare,
    train,
    convert,
    serve,
    triton,
    plugins,
    doctor,
):
    module.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        from gsx import __version__

        typer.echo(f"gsx {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def gsx(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Token-gated and early-exit language models as ONNX graphs that really skip the work.

    Start with: gsx export MODEL --budget 0.7
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def command() -> Any:
    """The command line as one click command."""
    return get_command(app)
