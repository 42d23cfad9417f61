"""Checkpoints whose weights are quantized already: which layout they have, or their refusal.

Those of a plain layout are made floats while they are read (`layouts/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gsx_exporter.checkpoint.json_file import read_json
from gsx_exporter.checkpoint.layouts.awq import Awq
from gsx_exporter.checkpoint.layouts.gptq import Gptq
from gsx_exporter.checkpoint.layouts.layout import Layout
from gsx_exporter.checkpoint.layouts.packed import Packed
from gsx_exporter.checkpoint.layouts.scaled import Scaled
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.errors import CheckpointError

QUANTIZATION = "quantization_config"
# Files that quantizers write beside config.json, without a quantization_config in it, and what they call their method.
QUANTIZER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# What is read, for messages.
_READ = "float weights, or FP8, compressed-tensors, GPTQ or AWQ in a plain layout"
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
# Bits of a code that fill words without a rest.
_EVEN_BITS = (2, 4, 8)


def refuse_quantized(source: str | Path, found: str) -> NoReturn:
    """Refuse quantized weights that cannot be read."""
    raise CheckpointError(
        f"{source}: the checkpoint is already quantized",
        expected=_READ,
        found=found,
        todo="export the original checkpoint: gsx quantizes it itself",
    )


def layout_of(directory: Path, values: Mapping[str, Any]) -> Layout | None:
    """How a checkpoint's weights are quantized, by what its configuration files say; None if they are not.

    Args: values: `config.json`.
    Raises:
        CheckpointError: they are quantized in a way that is not read.
    """
    path, section = directory / CONFIG, values.get(QUANTIZATION)
    if values.get("quantization"):
        refuse_quantized(path, f"an MLX model, quantization {values['quantization']!r}")
    if values.get("compression_config"):
        refuse_quantized(path, "compression_config, as earlier versions of compressed-tensors wrote it")
    if not section:
        path = next((directory / name for name in QUANTIZER_FILES if (directory / name).is_file()), path)
        if path.name == CONFIG:
            return None
        section = {"quant_method": QUANTIZER_FILES[path.name], **read_json(path)}
    if not isinstance(section, dict):
        refuse_quantized(path, f"{QUANTIZATION} {section!r}")
    method = section.get("quant_method")
    if method == "fp8":
        return Scaled("FP8", "weight_scale_inv", by_transformers=True)
    if method == "fbgemm_fp8":
        return Scaled("FP8 of FBGEMM", "weight_scale", by_transformers=False)
    if method == "modelopt":
        return _modelopt(path, section)
    if method == "compressed-tensors":
        return _compressed_tensors(path, section)
    if method == "gptq":
        return _gptq(path, section)
    if method == "awq":
        return _awq(path, section)
    refuse_quantized(path, str(method or f"a {QUANTIZATION} without quant_method"))


def quantized_by(name: str) -> str | None:
    """Which quantizers give a tensor such a name; None for the name of a float tensor."""
    return next((method for end, method in _QUANTIZED_PARTS.items() if name.endswith(end)), None)


def _modelopt(path: Path, section: Mapping[str, Any]) -> Layout:
    inner = section.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else section).get("quant_algo")
    if algorithm != "FP8":
        refuse_quantized(path, f"ModelOpt's {algorithm}")
    return Scaled("FP8 of ModelOpt", "weight_scale", by_transformers=False)


def _compressed_tensors(path: Path, section: Mapping[str, Any]) -> Layout:
    sparsity, transforms = section.get("sparsity_config"), section.get("transform_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        refuse_quantized(path, f"compressed-tensors with sparsity, {sparsity['format']}")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        refuse_quantized(path, "compressed-tensors with transforms of weights and states")
    groups = section.get("config_groups")
    found = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    formats = {group.get("format") or section.get("format") for group in found}
    weights = [group["weights"] for group in found if isinstance(group.get("weights"), dict)]
    forms = {(one.get("num_bits"), one.get("type", "int")) for one in weights}
    if len(formats) != 1 or len(forms) != 1 or any(one.get("actorder") in ("group", "dynamic") for one in weights):
        refuse_quantized(
            path, f"compressed-tensors in formats {sorted(map(str, formats))} with {sorted(map(str, forms))}"
        )
    (form,), ((bits, kind),) = formats, forms
    if form in ("float-quantized", "int-quantized", "naive-quantized") and bits == 8:
        return Scaled(f"compressed-tensors, {kind} in 8 bits", "weight_scale", by_transformers=True)
    if form == "pack-quantized" and kind == "int" and bits in _EVEN_BITS:
        return Packed(f"compressed-tensors, int in {bits} bits", bits)
    refuse_quantized(path, f"compressed-tensors, {form}, {kind} in {bits} bits")


def _gptq(path: Path, section: Mapping[str, Any]) -> Layout:
    bits, form = section.get("bits"), section.get("checkpoint_format") or "gptq"
    offsets = {"gptq": 1, "gptq_v2": 0}
    if bits not in _EVEN_BITS or form not in offsets:
        refuse_quantized(path, f"GPTQ in {bits} bits, checkpoint_format {form}")
    return Gptq(bits, offsets[form])


def _awq(path: Path, section: Mapping[str, Any]) -> Layout:
    bits, form = section.get("bits", section.get("w_bit")), str(section.get("version", "gemm")).lower()
    if bits != 4 or form != "gemm":
        refuse_quantized(path, f"AWQ in {bits} bits, version {form}")
    return Awq()
