"""`config.json`, read by transformers' own configuration classes, so that their defaults and legacy spellings apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gsx_exporter.checkpoint.folder import check_not_quantized, listing
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.config import FAMILIES
from gsx_exporter.errors import CheckpointError

_MOST_LAYERS = 10_000


def read_config(directory: Path) -> Any:
    """The transformers configuration of a model directory or a bundle.

    Raises:
        CheckpointError: there is no configuration, it is unreadable, its family is not supported, or the weights are
            quantized.
    """
    from transformers import AutoConfig

    path = directory / CONFIG
    raw = read_json(path) if path.is_file() else None
    if raw is None:
        raise CheckpointError(
            f"{directory}: has no {CONFIG}", expected="a Hugging Face model directory", found=listing(directory)
        )
    if "model_type" not in raw:
        raise CheckpointError(f"{path}: has no model_type", todo="is this a Hugging Face model directory?")
    if raw["model_type"] not in tuple(FAMILIES):
        raise CheckpointError(
            f"{path}: model_type {raw['model_type']!r} is not supported",
            expected="one of " + ", ".join(FAMILIES),
            todo="docs/add-a-family.md explains how to add one",
        )
    check_not_quantized(directory, raw)
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:  # transformers makes lists of this length
        raise CheckpointError(
            f"{path}: num_hidden_layers is out of range", expected=f"at most {_MOST_LAYERS}", found=str(layers)
        )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types of error here, all about this one file
        raise CheckpointError(f"{path}: transformers cannot read it", found=one_line(error)) from error


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
