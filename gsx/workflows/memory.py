"""Whether quantizing has enough memory: asked before the work, which takes minutes."""

from __future__ import annotations

from gsx_engines.building.memory import available_memory
from gsx_exporter.config import ModelConfig
from gsx_exporter.text import WINDOW_TOKENS
from gsx_plugins.errors import GsxError

_FLOAT = 4
# A Hessian, its inverse, and the factor of the inverse.
_OF_HESSIAN = 3
# States of the calibration text that are in memory next to each other: residual stream, norm, output of a branch.
_STATES = 3


def quantizing_bytes(config: ModelConfig, tokens: int) -> int:
    """The least memory that quantizing needs, from the model's shape: it goes through the model layer by layer.

    Args: tokens: of the calibration text.
    """
    hidden, width, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_heads * config.head_dim
    layer = hidden * (2 * heads + 2 * config.num_kv_heads * config.head_dim + 3 * width) * _FLOAT
    hessians = (2 * hidden**2 + heads**2 + _OF_HESSIAN * width**2) * _FLOAT
    states = tokens * hidden * _STATES * _FLOAT
    logits = WINDOW_TOKENS * vocabulary * 2 * _FLOAT + vocabulary * hidden * _FLOAT
    return max(2 * layer + hessians + states, logits + states)


def check_quantizing_memory(config: ModelConfig, tokens: int) -> None:
    """Refuse to begin what would run out of memory. Raises: GsxError."""
    needed, free = quantizing_bytes(config, tokens), available_memory()
    if free is not None and needed > free:
        raise GsxError(
            "not enough memory to quantize this model",
            expected=f"{needed / 1e9:.1f} GB or more, for the largest layer, its statistics and the text",
            found=f"{free / 1e9:.1f} GB available",
            todo="give fewer --calibration-tokens, or quantize on a larger machine: the bundle runs on this one too",
        )
