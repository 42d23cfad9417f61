"""`config.json`, read by transformers' own configuration classes, so that their defaults and legacy spellings apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gsx_exporter.checkpoint.json_file import one_line, read_json
from gsx_exporter.checkpoint.kinds import listing
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.quantized import check_not_quantized
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import FAMILIES

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
