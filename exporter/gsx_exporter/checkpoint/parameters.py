"""How the decoder's parameters are stored, in families that store or compute them otherwise than Llama.

The decoder (`decoder/`) has one form: Q, K and V are three products, and gate and up projection two; a norm multiplies
by its weight; factors of what a branch adds, and of the logits, are parts of weights. So a parameter is some rows of a
stored tensor, with an offset and a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gsx_exporter.checkpoint.tensors import FINAL_NORM, FUSED_GATE_UP, FUSED_QKV
from gsx_exporter.config import ModelConfig


@dataclass(frozen=True)
class Stored:
    """Where a parameter of the decoder comes from: `factor * (tensor[rows] + offset)`.

    Args:
        tensor: name in the checkpoint, as transformers calls it.
        rows: first row, and the row after the last; None for all.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    offset: float = 0.0
    factor: float = 1.0

    @property
    def is_changed(self) -> bool:
        """Whether the values are others than those stored."""
        return (self.offset, self.factor) != (0.0, 1.0)


def stored_as(config: ModelConfig, parameter: str) -> Stored:
    """How a parameter of the decoder is stored. Args: parameter: its name, with the prefix of a whole model's."""
    *path, module, kind = parameter.split(".")
    tensor, rows = parameter, None
    if config.fused:
        for fused, parts in _fused(config).items():
            if module in parts:
                tensor, rows = ".".join((*path, fused, kind)), parts[module]
    offset = config.norm_offset if module in _norms(config) else 0.0
    factor = 1.0
    if f"{module}.{kind}" == FINAL_NORM and path == ["model"]:
        factor = config.scales.logits
    elif module in ("o_proj", "down_proj") and path[-1] in ("self_attn", "mlp"):
        factor = config.scales.residual
    return Stored(tensor, rows, offset, factor)


def _norms(config: ModelConfig) -> set[str | None]:
    return {"norm", "q_norm", "k_norm"}.union(*((norms.before, norms.after) for norms in config.norms.values()))


def _fused(config: ModelConfig) -> Mapping[str, Mapping[str, tuple[int, int]]]:
    """Fused tensors: module -> the modules that it consists of, with their rows."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = config.intermediate_size
    return {
        FUSED_QKV: {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)},
        FUSED_GATE_UP: {"gate_proj": (0, width), "up_proj": (width, 2 * width)},
    }
