"""Shared by the commands that measure a model and may write a page: `gsx study`, `gsx compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gsx.cli.console import out, print_json


class _Report(Protocol):
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ...

    def write_page(self, path: str | Path) -> None:
        """Write it as one HTML page."""
        ...


R = TypeVar("R", bound=_Report)


def show(report: R, as_json: bool, tables: Callable[[R], None], page: Path | None) -> None:
    """Print a report, then write its page: if the page cannot be written, the figures are not lost."""
    if as_json:
        print_json(report.to_dict())
    else:
        tables(report)
    if page is not None:
        report.write_page(page)
        if not as_json:
            out().print(f"see {page}")
