"""A report as a page."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """The HTML text of a template of this folder."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("gsx", "pages")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values) + "\n"
