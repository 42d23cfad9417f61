"""The JSON files of a model directory: each holds an object, or is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gsx_exporter.errors import CheckpointError


def read_json(path: Path, todo: str | None = None) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args: todo: what to do if it is not readable.
    Raises:
        CheckpointError: it is not readable, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable JSON", found=str(error), todo=todo) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is not a JSON object", expected="{...}", found=json.dumps(raw)[:80], todo=todo)
    return raw


def one_line(error: BaseException) -> str:
    """The whole message of another library's error, on one line; its type where it has no message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
