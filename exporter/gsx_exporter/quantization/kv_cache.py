"""How large K and V of every head get: the scales of a K/V cache in 8 bits.

Keys are looked at as the cache holds them, with RoPE applied. Text goes through the model with the exported selection,
in full precision, as for the ranges of activations (`watch.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import KvCache
from gsx_engines.bundle.selection import CalibrationText
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.errors import CheckpointError
from gsx_exporter.quantization.plan import scale_value
from gsx_exporter.quantization.scheme import SCHEMES
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress, Progress, silent


def int8_kv_cache(
    checkpoint: Checkpoint,
    text: TokenText,
    controls: RuntimeValues,
    options: DecoderOptions,
    on_progress: OnProgress = silent,
) -> KvCache:
    """Scales for each head of each layer, by which the largest K and V seen take the largest code.

    Args:
        controls: run-time inputs of the keep rule, as exported.
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
            assert stream.below is not None, "a layer leaves its K and V"
            key, value = stream.below
            source = f"{checkpoint.source}: layers.{number}.self_attn"
            scales.append((_scales(key, f"{source}: a key"), _scales(value, f"{source}: a value")))
            on_progress(Progress("watching K and V", number + 1, checkpoint.config.num_layers))
    calibration = CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)
    return KvCache(type="int8", scales=tuple(scales), calibration=calibration)


def _scales(cache: Tensor, what: str) -> tuple[float, ...]:
    """K or V [B, kv heads, S, D] -> a scale for each head."""
    largest = cache.abs().amax(dim=(0, 2, 3))
    if not bool(largest.isfinite().all()):
        raise CheckpointError(
            f"{what} is not finite on this text",
            found="NaN" if bool(cache.isnan().any()) else "infinity",
            todo="the model diverges there in full precision: 8 bits cannot mend that",
        )
    return tuple(float(scale_value(float(size) / SCHEMES["int8"].largest, torch.float32)) for size in largest)
