"""What the commands share that measure a model and may write a page: `gsx study`, `gsx compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from gsx.cli.console import out, print_json

ModelArgument = Annotated[str, typer.Argument(help="A model directory or a hub id.", show_default=False)]
PageOption = Annotated[Path | None, typer.Option("-o", "--output", help="HTML page to write.", show_default="none")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


class _Report(Protocol):
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...


R = TypeVar("R", bound=_Report)


def show(
    report: R, as_json: bool, tables: Callable[[R], None], page: Path | None, write: Callable[[R, Path], None]
) -> None:
    """Print a report, and write its page; in this order, so that a page that cannot be written loses no figures."""
    if as_json:
        print_json(report.to_dict())
    else:
        tables(report)
    if page is not None:
        write(report, page)
        if not as_json:
            out().print(f"{page} shows it")
