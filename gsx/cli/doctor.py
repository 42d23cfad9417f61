"""`gsx doctor`."""

from __future__ import annotations

import typer

from gsx.cli.console import ProgressLine, out, print_json, table
from gsx.cli.options import JsonOption

_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(doctor)


def doctor(
    as_json: JsonOption = False,
) -> None:
    """Check what works on this machine, and show how to get the rest.

    Exit code 1 only if exporting and running on a CPU cannot work.

    Example: gsx doctor
    """
    from gsx import doctor as look

    with ProgressLine() as line:
        report = look(on_progress=line.show)
    if as_json:
        print_json(report.to_dict())
    else:
        from rich.text import Text

        rows = [(row.name, Text(row.status, _STYLES[row.status]), row.detail, row.todo or "") for row in report.rows]
        console = out()
        console.print(table(None, ("what", "status", "found", "how to get it"), rows))
        console.print("the CPU chain works" if report.passed else "the CPU chain does not work: see above")
    if not report.passed:
        raise typer.Exit(1)
