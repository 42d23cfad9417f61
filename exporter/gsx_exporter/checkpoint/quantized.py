"""Checkpoints whose weights are quantized already: how they are recognized, and their refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.errors import CheckpointError

# Files that quantizers write beside config.json, without a quantization_config in it.
QUANTIZER_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
# Ends of tensor names that only quantized weights have.
_QUANTIZED_PARTS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scales": "MLX, GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_format": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
}


def refuse_quantized(source: str | Path, found: str) -> NoReturn:
    """Refuse weights that are not floats."""
    raise CheckpointError(
        f"{source}: the checkpoint is already quantized",
        expected="float weights",
        found=found,
        todo="export the original checkpoint: gsx quantizes it itself",
    )


def check_not_quantized(directory: Path, raw: dict[str, Any]) -> None:
    """Refuse a quantized checkpoint by what its configuration files say.

    Args: raw: `config.json` as plain values.
    """
    for key in ("quantization_config", "compression_config"):
        if section := raw.get(key):
            method = section.get("quant_method") if isinstance(section, dict) else None
            refuse_quantized(directory / CONFIG, f"{method}" if method else f"a {key}")
    if raw.get("quantization"):
        refuse_quantized(directory / CONFIG, f"an MLX model, quantization {raw['quantization']!r}")
    for name, method in QUANTIZER_FILES.items():
        if (directory / name).is_file():
            refuse_quantized(directory, f"{name}, as {method} writes it")


def quantized_by(name: str) -> str | None:
    """Which quantizers give a tensor such a name; None for the name of a float tensor."""
    return next((method for end, method in _QUANTIZED_PARTS.items() if name.endswith(end)), None)
