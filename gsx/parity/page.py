"""The parity report as a page: one HTML file with everything in it."""

from __future__ import annotations

from importlib import resources

from gsx.parity.plots import page_plots
from gsx.parity.report import Report


def page(report: Report) -> str:
    """The HTML text."""
    from jinja2 import Environment

    template = (resources.files("gsx.parity") / "parity.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(report=report, plots=page_plots(report)) + "\n"
