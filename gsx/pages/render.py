"""Renders a report as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gsx_plugins.errors import GsxError


def render(template: str, **values: Any) -> str:
    """The HTML text of a template of this folder."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("gsx", "pages")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values) + "\n"


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Write the HTML text of a template of this folder to a file.

    Raises:
        GsxError: the file cannot be written.
    """
    text = render(template, **values)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise GsxError(f"{path}: could not be written", found=error.strerror or str(error)) from error
