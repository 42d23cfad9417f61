"""The card of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_card(folder: Path, settings: Any, facts: Any, trainer: Any, rows: Any, command: str) -> None:
    (folder / "README.md").write_text("card\n")
