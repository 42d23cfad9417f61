"""The parity report as a single self-contained HTML page."""

from __future__ import annotations

from gsx.pages.render import render
from gsx.parity.plots import limits_used, page_plots
from gsx.parity.report import Report


def page(report: Report) -> str:
    """The HTML text."""
    return render("parity.html.j2", report=report, picture=limits_used(report), plots=page_plots(report))
