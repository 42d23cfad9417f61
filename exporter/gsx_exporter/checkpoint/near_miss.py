"""Why a model is of none of the supported families: the traits that none of them has, read from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_Values = Mapping[str, Any]
# What a Balcony checkpoint says of its exits.
_BALCONY = ("exit_layer_indices", "exit_decoder_layer", "exit_attention", "exit_mlp")


def _has(*names: str) -> Callable[[_Values], str | None]:
    """Whether a configuration sets one of these keys, which then is what gives the trait away."""
    return lambda values: next((name for name in names if values.get(name)), None)


def _begins(*beginnings: str) -> Callable[[_Values], str | None]:
    return lambda values: next((name for name in values if name.startswith(beginnings) and values[name]), None)


def _other_layers(values: _Values) -> str | None:
    """What gives away a kind of layer that is no softmax attention."""
    for key in ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern"):
        listed = values.get(key)
        for kind in listed if isinstance(listed, list) else []:
            if isinstance(kind, str) and not kind.endswith("attention"):
                return f"{key} {kind}"
            if kind == "linear_attention":
                return f"{key} {kind}"
        if isinstance(listed, str):
            return key
    return _begins("ssm_", "mamba_", "linear_")(values) or _has("state_size", "attn_layer_period")(values)


def _alibi(values: _Values) -> str | None:
    if values.get("position_embedding_type") == "alibi":
        return "position_embedding_type alibi"
    return "alibi" if values.get("alibi") else None


def _axes(values: _Values) -> str | None:
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(key), dict) and values[key].get("mrope_section"):
            return f"{key} mrope_section"
    return None


# Traits that no supported family has, and the key that gives each away.
_TRAITS: Mapping[str, Callable[[_Values], str | None]] = {
    "it is an encoder-decoder": _has("is_encoder_decoder", "encoder_layers", "num_encoder_layers"),
    "it is multimodal, with a text part that cannot be separated": _has("vision_config", "audio_config"),
    "some of its layers are no attention (a hybrid of state-space or linear-attention layers)": _other_layers,
    "its attention compresses K and V (MLA)": _has("kv_lora_rank"),
    "its tokens choose among experts in a way of its own": _has(
        "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "ffn_config"
    ),
    "its positions are not rotary (ALiBi)": _alibi,
    "its positions have several axes, for images and time": _axes,
    "its positions are learned, not rotary": _has("n_positions", "n_ctx"),
    "attention and MLP read the same state, in parallel": _has(
        "parallel_attn", "use_parallel_residual", "parallel_residual"
    ),
    "its norm is LayerNorm": _has(
        "layer_norm_epsilon", "layer_norm_eps", "layer_norm_elementwise_affine", "norm_epsilon"
    ),
    "it reads texts in both directions": _has("type_vocab_size"),
    "its exits have norms or layers of their own (Balcony)": _has("exit_decoder_layer", "exit_layer_indices"),
    "it needs code of its own, which is never run": _has("auto_map"),
}


def unknown_traits(values: Mapping[str, Any]) -> list[str]:
    """Why a model is not a near relative of the supported families, each in words with the key that says so.

    Args: values: `config.json`.
    """
    found = ((trait, key(values)) for trait, key in _TRAITS.items())
    return [f"{trait} ({key})" for trait, key in found if key is not None]


def way_out(values: Mapping[str, Any]) -> str:
    """What to do about a model of no supported family. Args: values: `config.json`."""
    if values.get("model_type") == "nested_llama":
        own = [key for key in _BALCONY if values.get(key)]
        return f"without its exits it is a Llama: set model_type to llama and remove {', '.join(own)} to export it"
    return "docs/add-a-family.md says what a family must be like, and how to add one"
