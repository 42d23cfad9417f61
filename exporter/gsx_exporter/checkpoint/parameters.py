"""How the decoder's parameters are stored, in families that store or compute them otherwise than Llama.

The decoder (`decoder/`) has one form: Q, K and V are three products, and gate and up projection two; a norm multiplies
by its weight; factors of what a branch adds, of the logits, and of the channels of a product are parts of weights. So a
parameter is some rows of a stored tensor, with an offset and a factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gsx_exporter.checkpoint.tensors import FINAL_NORM, FUSED_GATE_UP, FUSED_QKV, HEAD, LOGIT_SCALE
from gsx_exporter.config import ModelConfig
from gsx_exporter.sphere import Sphere


@dataclass(frozen=True)
class Stored:
    """Where a parameter of the decoder comes from: `form(factor * (tensor[rows] + offset))`, times `channels`.

    Args:
        tensor: name in the checkpoint, as transformers calls it.
        rows: first row, and the row after the last; None for all.
        form: what becomes of each number.
        channels: a factor for each row, stored in a tensor of its own; None for none.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    offset: float = 0.0
    factor: float = 1.0
    form: Literal["as it is", "square", "magnitude"] = "as it is"
    channels: Stored | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the values are others than those stored."""
        return (self.offset, self.factor, self.form) != (0.0, 1.0, "as it is") or self.channels is not None


def stored_as(config: ModelConfig, parameter: str) -> Stored:
    """How a parameter of the decoder is stored. Args: parameter: its name, with the prefix of a whole model's."""
    if config.sphere is not None and (found := _of_sphere(config.sphere, parameter)) is not None:
        return found
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


def _of_sphere(sphere: Sphere, parameter: str) -> Stored | None:
    """The parameters of a normalized Transformer that have factors; None for the others."""
    place, name = parameter[: parameter.rfind(".") + 1], parameter.rpartition(".")[2]
    rates = {"attn_rate": "lambda_1", "mlp_rate": "lambda_2"}
    if name in rates:
        return Stored(place + rates[name], factor=sphere.rate, form="magnitude")
    if name == "query_scale":
        return Stored(f"{place}sqk", factor=sphere.query, form="square")
    if parameter == HEAD:
        return Stored(parameter, channels=Stored(LOGIT_SCALE, factor=sphere.logits))
    for product, factors in {
        "self_attn.gate_proj.": Stored("s_gate", factor=sphere.gate, form="square"),
        "mlp.gate_proj.": Stored("suv_gate", factor=sphere.mlp),
        "mlp.up_proj.": Stored("suv_up", factor=sphere.mlp),
    }.items():
        if place.endswith(product):
            branch = place.removesuffix(product.partition(".")[2])
            return Stored(parameter, channels=replace(factors, tensor=branch + factors.tensor))
    return None


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
