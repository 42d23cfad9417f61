"""Whether there is enough memory for work that takes minutes: asked before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gsx_engines.building.memory import available_memory
from gsx_exporter.text import WINDOW_TOKENS
from gsx_plugins.errors import GsxError

if TYPE_CHECKING:
    from gsx_exporter.config import ModelConfig  # `gsx bench` checks memory where what this needs is not installed

_FLOAT = 4
# A Hessian, and the factor of its inverse; the codes of its product's weights, and what is left to round.
_OF_HESSIAN, _OF_WEIGHTS = 2, 2
# Logits: two models', and those before.
_OF_LOGITS = 4
# States of the calibration text that are in memory next to each other: residual stream, norm, output of a branch.
_STATES = 3


def check_memory(message: str, needed: float, uses: str, todo: str) -> None:
    """Refuse to begin what would run out of memory.

    Args:
        message: what there is not enough memory for, in a sentence; uses: what needs it; todo: how to need less.
        needed: bytes.
    Raises: GsxError.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise GsxError(
            message,
            expected=f"{needed / 1e9:.1f} GB or more, for {uses}",
            found=f"{free / 1e9:.1f} GB available",
            todo=todo,
        )


def check_quantizing_memory(config: ModelConfig, tokens: int, *, chooses_codes: bool) -> None:
    """The same for quantizing, which goes through the model layer by layer.

    Args:
        tokens: of the calibration text.
        chooses_codes: whether codes are chosen by Hessians of the layers' inputs.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    plain = not all(map(config.is_routed, range(config.num_layers)))
    width = config.intermediate_size if plain else 0  # no Hessian is made of what experts read
    experts = config.experts
    widest = max(width, experts.count * experts.width + (experts.shared_width or 0) if experts else 0)
    heads = config.num_heads * config.head_dim
    layer = hidden * (2 * heads + 2 * config.num_kv_heads * config.head_dim + 3 * widest) * _FLOAT
    of_width = _OF_HESSIAN * width**2 + _OF_WEIGHTS * width * hidden
    hessians = (2 * hidden**2 + heads**2 + of_width) * _FLOAT if chooses_codes else 0
    states = tokens * hidden * _STATES * _FLOAT
    logits = WINDOW_TOKENS * vocabulary * _OF_LOGITS * _FLOAT + vocabulary * hidden  # the head as INT8
    check_memory(
        "not enough memory to quantize this model",
        max(layer + hessians, logits) + states,
        "the largest layer, its statistics and the text",
        "give fewer --calibration-tokens, or quantize on a larger machine: the bundle runs on this one too",
    )
