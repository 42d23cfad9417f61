"""Writes the vectors: `python -m tests.vectors.make`. A test makes them again and compares, so they cannot go stale.

Each file has inputs and the results of Python. The module of the same name says what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.vectors import draft_length, generation, hold, sampling, thresholds

FOLDER = Path(__file__).parent
FILES: dict[str, Callable[[], Any]] = {
    "sampling": sampling.vectors,
    "draft_length": draft_length.vectors,
    "thresholds": thresholds.vectors,
    "hold": hold.vectors,
    "generation": generation.vectors,
}


def text_of(name: str) -> str:
    """A file of vectors: JSON, one case per line."""
    made = FILES[name]()
    cases = made if isinstance(made, list) else made.get("cases")
    if cases is None:
        return json.dumps(made) + "\n"
    lines = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]"
    if isinstance(made, list):
        return lines + "\n"
    return '{"manifests": ' + json.dumps(made["manifests"]) + ',\n"cases": ' + lines + "}\n"


if __name__ == "__main__":
    for file in FILES:
        (FOLDER / f"{file}.json").write_text(text_of(file), encoding="utf-8")
