"""Routed experts as a trait of a family: which keys of a configuration describe them, and what they say.

In a routed layer the MLP is a number of experts of one shape, of which every token runs through a few, as a router
chooses them; in some families one more, the shared expert, runs for all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gsx_exporter.errors import CheckpointError
from gsx_exporter.section import whole

Spelling = Literal["qwen", "mixtral"]


@dataclass(frozen=True)
class ExpertKeys:
    """Where a family's configuration describes its experts; defaults as in Qwen's.

    Args:
        count: key for the number of experts of a layer.
        width: key for the width of one expert.
        normalized: whether the weights of a token's experts are divided by their sum, or the key that says so.
        shared_width: key for the width of the shared expert; None in a family without.
        by_layer: whether `decoder_sparse_step` and `mlp_only_layers` say which layers are routed; else all are.
        spelling: whose names the family's checkpoints have for experts (`checkpoint/experts.py`).
    """

    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    normalized: str | bool = "norm_topk_prob"
    shared_width: str | None = None
    by_layer: bool = True
    spelling: Spelling = "qwen"


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    Args:
        layers: the routed layers, ascending; the other layers have a plain MLP.
        count: experts of a layer.
        per_token: how many of them a token runs through.
        width: of one expert.
        normalized: whether the weights of a token's experts are divided by their sum.
        shared_width: width of the shared expert; None without.
        spelling: whose names the checkpoint has for experts.
    """

    layers: tuple[int, ...]
    count: int
    per_token: int
    width: int
    normalized: bool
    shared_width: int | None
    spelling: Spelling


def read_experts(hf: Any, keys: ExpertKeys) -> Experts | None:
    """From a transformers configuration object; None if no layer is routed.

    Raises:
        CheckpointError: a number that no such model has, or more experts per token than there are.
    """
    count, per_token = getattr(hf, keys.count), hf.num_experts_per_tok
    layers = _routed_layers(hf, count) if keys.by_layer else tuple(range(hf.num_hidden_layers))
    if not layers:
        return None
    sizes = {keys.count: count, "num_experts_per_tok": per_token, keys.width: getattr(hf, keys.width)}
    if keys.shared_width is not None:
        sizes[keys.shared_width] = getattr(hf, keys.shared_width)
    for name, size in sizes.items():
        whole(name, size, 1)
    if per_token > count:
        raise CheckpointError(
            "config.json: a token cannot run through more experts than there are",
            expected=f"num_experts_per_tok up to {keys.count} {count}",
            found=str(per_token),
        )
    normalized = keys.normalized if isinstance(keys.normalized, bool) else bool(getattr(hf, keys.normalized))
    shared = None if keys.shared_width is None else sizes[keys.shared_width]
    return Experts(layers, count, per_token, sizes[keys.width], normalized, shared, keys.spelling)


def _routed_layers(hf: Any, count: Any) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer without those of `mlp_only_layers`; none if there are no experts."""
    whole("num_experts", count, 0)
    whole("decoder_sparse_step", hf.decoder_sparse_step, 1)
    plain = hf.mlp_only_layers
    if not isinstance(plain, list | tuple):
        raise CheckpointError(
            "config.json: mlp_only_layers is not a list of layers", expected="a list of numbers", found=repr(plain)
        )
    if not count:
        return ()
    every = range(hf.decoder_sparse_step - 1, hf.num_hidden_layers, hf.decoder_sparse_step)
    return tuple(layer for layer in every if layer not in plain)
