"""The scales of an 8-bit K/V cache, from the largest K and V of every head.

Keys are measured as the cache stores them, with RoPE applied. Text is run through the model with the exported
selection, in full precision, as for the ranges of activations (`watch.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import KvCache
from gsx_engines.bundle.selection import CalibrationText
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.errors import CheckpointError
from gsx_exporter.quantization.plan import scale_value
from gsx_exporter.quantization.scheme import INT8
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress, Progress, silent


def int8_kv_cache(
    checkpoint: Checkpoint,
    text: TokenText,
    controls: RuntimeValues,
    options: DecoderOptions,
    on_progress: OnProgress = silent,
) -> KvCache:
    """Scales for each head of each layer, with which the largest K and V found get the largest code.

    Args:
        checkpoint: the model.
        text: calibration text.
        controls: run-time inputs of the keep rule, as exported.
        options: keep rule and K/V policy.
        on_progress: called after each layer.
    Raises:
        CheckpointError: K or V of some layer is not finite.
    """
    scales = []
    with torch.inference_mode():
        walk = Walk(checkpoint, text.ids, options)
        stream = walk.stream(controls)
        for number, layer in walk.layers():
            walk.through(number, layer, stream)
            key, value = stream.below[number]
            source = f"{checkpoint.source}: layers.{number}.self_attn"
            scales.append((_scales(key, f"{source}: a key"), _scales(value, f"{source}: a value")))
            on_progress(Progress("measuring K and V", number + 1, checkpoint.config.num_layers))
    calibration = CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)
    return KvCache(type="int8", scales=tuple(scales), calibration=calibration)


def _scales(cache: Tensor, what: str) -> tuple[float, ...]:
    """K or V [B, kv heads, S, D] -> a scale for each head."""
    largest = cache.abs().amax(dim=(0, 2, 3))
    if not bool(largest.isfinite().all()):
        raise CheckpointError(
            f"{what} is not finite on this text",
            found="NaN" if bool(cache.isnan().any()) else "infinity",
            todo="the model diverges there in full precision too: repair the model first",
        )
    return tuple(float(scale_value(float(size) / INT8.largest, torch.float32)) for size in largest)
