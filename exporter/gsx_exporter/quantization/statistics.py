"""How large the inputs of every linear layer get: the numbers, and keeping them from one export to the next.

They depend on model, text and selection alone, not on the type that is quantized to, so they are kept under a hash of
those. `watch.py` finds them.
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
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_plugins.files import cache_folder, writing_file

# Goes into the key of what is kept: another way of counting, or of making the key, must not find the old numbers.
_VERSION = 2


@dataclass(frozen=True)
class Statistics:
    """Sizes at one selection.

    Args:
        inputs: linear layer ("layers.0.mlp.up_proj") -> [in] float32, the largest magnitude of each input channel
            over the rows that the layer ran on; 0 where it never ran.
        weights: linear layer -> [in] float32, the largest magnitude of the weights that read the channel.
    """

    inputs: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]


def default_cache() -> Path:
    """Where statistics are kept between exports."""
    return cache_folder() / "statistics"


def key(
    checkpoint: Checkpoint, ids: np.ndarray, text_sha256: str, options: DecoderOptions, controls: RuntimeValues
) -> str:
    """What the numbers depend on, hashed: weights and configuration, text, the keep rule with all its parameters and
    run-time inputs, and the K/V policy. The type of the graph is not in it: the walk computes in float32."""
    rule = options.rule
    parts: list[object] = [_VERSION, checkpoint.weights_sha256(), checkpoint.hf_config.to_json_string()]
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
    """What an earlier export kept, if it did."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            inputs = {name.removeprefix("in:"): stored[name] for name in stored.files if name.startswith("in:")}
            weights = {name.removeprefix("w:"): stored[name] for name in stored.files if name.startswith("w:")}
    except (OSError, ValueError):
        return None  # a file that broke off is as good as none
    return Statistics(inputs, weights)


def save(path: Path, found: Statistics) -> None:
    """Keep a file, whole; a cache that cannot be written is no reason to fail."""
    arrays: dict[str, Any] = {f"in:{name}": sizes for name, sizes in found.inputs.items()}
    arrays |= {f"w:{name}": sizes for name, sizes in found.weights.items()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as work, work.open("wb") as stream:
            np.savez(stream, **arrays)
