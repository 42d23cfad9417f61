"""The largest magnitudes of every linear layer's inputs, and a cache for them between exports.

They depend only on model, text and selection, not on the quantization scheme, so the cache's key is a hash of those.
`watch.py` measures them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_plugins.files import cache_folder, writing_file

# Part of the cache's key: to be raised when the statistics, or the key, are computed in another way.
_VERSION = 2


@dataclass(frozen=True)
class Statistics:
    """Largest magnitudes at one selection.

    Args:
        inputs: linear layer ("layers.0.mlp.up_proj") -> [in] float32, the largest magnitude of each input channel
            over the rows that the layer ran on; 0 if it never ran.
        weights: linear layer -> [in] float32, the largest magnitude of the weights that read the channel.
    """

    inputs: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]


def default_cache() -> Path:
    """The directory where statistics are cached between exports."""
    return cache_folder() / "statistics"


def key(
    checkpoint: Checkpoint, ids: np.ndarray, text_sha256: str, options: DecoderOptions, controls: RuntimeValues
) -> str:
    """Hash of everything that the statistics depend on: weights and configuration, text, the keep rule with all its
    parameters and run-time inputs, and the K/V policy. Not of the graph's type: the walk computes in float32."""
    rule = options.rule
    parts: list[object] = [_VERSION, checkpoint.weights_sha256(), checkpoint.hf_config.to_json_string()]
    parts.append(checkpoint.config.max_positions)  # decides which factors LongRoPE has
    parts += [text_sha256, ids.shape, ids.dtype, options.kv_policy]
    # A rule is a frozen dataclass, so that its repr shows every parameter.
    parts += [f"{type(rule).__module__} {rule!r}" if rule is not None else None]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    digest.update(ids.tobytes())
    for name, given in sorted(controls.items()):
        value = np.asarray(given)
        digest.update(f"\n{name} {value.dtype} {value.shape}\n".encode() + value.tobytes())
    return digest.hexdigest()


def load(path: Path) -> Statistics | None:
    """Read cached statistics; None if the file does not exist or is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            inputs = {name.removeprefix("in:"): stored[name] for name in stored.files if name.startswith("in:")}
            weights = {name.removeprefix("w:"): stored[name] for name in stored.files if name.startswith("w:")}
    except (OSError, ValueError):
        return None  # a truncated file counts as missing
    return Statistics(inputs, weights)


def save(path: Path, found: Statistics) -> None:
    """Write a file, completely or not at all. A cache that cannot be written is not an error."""
    arrays: dict[str, Any] = {f"in:{name}": sizes for name, sizes in found.inputs.items()}
    arrays |= {f"w:{name}": sizes for name, sizes in found.weights.items()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as work, work.open("wb") as stream:
            np.savez(stream, **arrays)
