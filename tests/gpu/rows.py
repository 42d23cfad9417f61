"""One line of the table that `python -m tests.gpu` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "fail", "missing", "-"]


@dataclass(frozen=True)
class Row:
    """What was checked or measured, the result, the goal, and the verdict (`-`: no goal; `missing`: a tool is not
    installed)."""

    what: str
    found: str
    goal: str = ""
    verdict: Verdict = "-"


def goal_row(what: str, found: str, goal: str, reached: bool) -> Row:
    return Row(what, found, goal, "pass" if reached else "fail")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, aligned."""
    cells = [("what", "found", "goal", "verdict"), *((r.what, r.found, r.goal, r.verdict) for r in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
