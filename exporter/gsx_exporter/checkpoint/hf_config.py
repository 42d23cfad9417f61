"""`config.json`, read by transformers' own configuration classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gsx_exporter.checkpoint.folder import listing
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.config import FAMILIES
from gsx_exporter.errors import CheckpointError


def read_config(directory: Path) -> Any:
    """The transformers configuration of a model directory or a bundle.

    Raises:
        CheckpointError: there is no configuration, it is unreadable, or its family is not supported.
    """
    from transformers import AutoConfig

    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {CONFIG}", expected="a Hugging Face model directory", found=listing(directory)
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is not readable JSON", found=str(error)) from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise CheckpointError(f"{path}: has no model_type", todo="is this a Hugging Face model directory?")

    if raw["model_type"] not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {raw['model_type']!r} is not supported",
            expected="one of " + ", ".join(FAMILIES),
            todo="docs/add-a-family.md explains how to add one",
        )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise already_quantized(path, method or "a quantization_config")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of error here, all about this one file
        raise CheckpointError(
            f"{path}: transformers cannot read it", found=str(error).strip().splitlines()[0]
        ) from error


def already_quantized(where: str | Path, found: str) -> CheckpointError:
    """The refusal of weights that are not floats."""
    return CheckpointError(
        f"{where}: the checkpoint is already quantized",
        expected="float weights",
        found=found,
        todo="export the original checkpoint: gsx quantizes it itself",
    )
