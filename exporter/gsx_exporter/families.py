"""The model families, as rows of one table: what differs between them is data, not classes.

A row states what a family's modelling code in transformers does and its configuration does not say. A value that the
configuration does state is named by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gsx_engines.bundle.words import Branch
from gsx_exporter.experts import ExpertKeys

# Which norms of Q and K come before RoPE: none, one for each head, or one over the whole width of the projection.
QkNorm = Literal["none", "head", "width"]


@dataclass(frozen=True)
class BranchNorms:
    """The names of a branch's norms within its layer.

    Args:
        before: of the branch's input; None if the branch reads the residual stream itself.
        after: of what the branch adds to the residual stream; None if nothing is between.
    """

    before: str | None
    after: str | None = None


LayerNorms = Mapping[Branch, BranchNorms]
NORMS_BEFORE: LayerNorms = {"attn": BranchNorms("input_layernorm"), "mlp": BranchNorms("post_attention_layernorm")}
NORMS_AFTER: LayerNorms = {
    "attn": BranchNorms(None, "post_attention_layernorm"),
    "mlp": BranchNorms(None, "post_feedforward_layernorm"),
}
NORMS_AROUND: LayerNorms = {
    "attn": BranchNorms("input_layernorm", "post_attention_layernorm"),
    "mlp": BranchNorms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class LoopKeys:
    """The keys that say how the layers of a looped model run.

    Args:
        before, looped, after: layers that run once, looped ones, and layers that run once after them; None for `before`
            and `after`: all layers are looped.
        count: of the loops.
        caches: which caches loops have (`Loops.caches`); None where each has its own.
        gate: whether a gate reads what each loop gives (`early_exit_gate`).
        rejoins: whether a loop begins with the norm of the state plus that of the state that entered the first loop;
            else every loop but the first begins with the final norm of the state.
    """

    before: str | None
    looped: str
    after: str | None
    count: str
    caches: str | None = None
    gate: bool = False
    rejoins: bool = False


@dataclass(frozen=True)
class SphereKeys:
    """The keys of a normalized Transformer (nGPT, arXiv:2410.01131): see `gsx_exporter.sphere`.

    Args:
        rate: of the initial interpolation rate; spread: of the standard deviation of initial weights, in which scaled
            parameters are stored.
    """

    rate: str
    spread: str


@dataclass(frozen=True)
class Family:
    """Traits of a model family. Where a trait is `str | bool` or a key, a string is a key of the configuration.

    Args:
        qkv_bias, o_bias, mlp_bias: whether Q, K and V, the output projection, and the MLP have a bias.
        qk_norm: the norms of Q and K.
        norms: the norms of each branch.
        norm_offset: added to the weight of every norm that transformers computes as (1 + w).
        windows: which layers `sliding_window` applies to: none (the key is ignored), all, or those that `layer_types`
            names.
        experts: the keys that describe routed experts; None in a family without.
        activation: the key of the MLP's activation.
        fused: whether Q, K and V are one tensor (`qkv_proj`), and gate and up projection too (`gate_up_proj`).
        partial_rotary: whether plain RoPE reads `partial_rotary_factor`.
        ropes_by_layer_type: whether `rope_parameters` has a section for each of `layer_types`.
        unrotated: the key that says which layers have RoPE (1) or not (0); None if all have it.
        embedding_scale: the key of the factor of the embeddings, or "sqrt(hidden_size)"; None for 1.
        attention_scale: the key of the factor of attention scores; None for 1/sqrt(D).
        query_width: the key of the number that takes the place of D in 1/sqrt(D); None for D.
        residual_scale: the key of the factor of what a branch adds; None for 1.
        logits_divisor: the key of the number that logits are divided by; None for 1.
        attention_softcap, logits_softcap: the keys of c in c tanh(x / c) of scores and logits; None for no such cap.
        loops: the keys of a looped model; None in a family whose layers run once.
        sphere: the keys of a normalized Transformer; None in other families.
        described: whether transformers has no such model, so that the reference is written from its description.
    """

    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: QkNorm = "none"
    norms: LayerNorms = field(default_factory=lambda: NORMS_BEFORE)
    norm_offset: float = 0.0
    windows: Literal["none", "all", "layer_types"] = "none"
    experts: ExpertKeys | None = None
    activation: str = "hidden_act"
    fused: bool = False
    partial_rotary: bool = False
    ropes_by_layer_type: bool = False
    unrotated: str | None = None
    embedding_scale: str | None = None
    attention_scale: str | None = None
    query_width: str | None = None
    residual_scale: str | None = None
    logits_divisor: str | None = None
    attention_softcap: str | None = None
    logits_softcap: str | None = None
    loops: LoopKeys | None = None
    sphere: SphereKeys | None = None
    described: bool = False


SQRT_WIDTH = "sqrt(hidden_size)"

_GEMMA2 = Family(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    norms=NORMS_AROUND,
    norm_offset=1.0,
    windows="layer_types",
    activation="hidden_activation",
    embedding_scale=SQRT_WIDTH,
    query_width="query_pre_attn_scalar",
    attention_softcap="attn_logit_softcapping",
    logits_softcap="final_logit_softcapping",
)
# Its attention does not read attn_logit_softcapping.
_GEMMA3 = replace(_GEMMA2, qk_norm="head", ropes_by_layer_type=True, attention_softcap=None)
_OLMO2 = Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="width", norms=NORMS_AFTER)

# From the modelling code of transformers 5 (`models/<family>/modeling_<family>.py`).
FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(windows="all"),
    "qwen2": Family(qkv_bias=True, windows="layer_types"),
    "qwen3": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head", windows="layer_types"),
    "mixtral": Family(
        windows="all",
        experts=ExpertKeys(
            count="num_local_experts", width="intermediate_size", normalized=True, by_layer=False, spelling="mixtral"
        ),
    ),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias",
        windows="layer_types",
        experts=ExpertKeys(shared_width="shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head", windows="all", experts=ExpertKeys()
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": Family(windows="all", fused=True, partial_rotary=True),
    "granite": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        embedding_scale="embedding_multiplier",
        attention_scale="attention_multiplier",
        residual_scale="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    "smollm3": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows="layer_types",
        unrotated="no_rope_layers",
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, windows="layer_types", ropes_by_layer_type=True),
    "dory": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        qk_norm="head",
        norms=NORMS_AROUND,
        windows="layer_types",
        ropes_by_layer_type=True,
        loops=LoopKeys(
            before="n_input_layers",
            looped="n_recurrent_layers",
            after="n_output_layers",
            count="n_recurrent_loops",
            caches="recurrent_kv_cache_mode",
            rejoins=True,
        ),
        sphere=SphereKeys(rate="ngpt_alpha_init", spread="initializer_range"),
    ),
    # `gsx_exporter/checkpoint/ouro.py`
    "ouro": Family(
        norms={
            "attn": BranchNorms("input_layernorm", "input_layernorm_2"),
            "mlp": BranchNorms("post_attention_layernorm", "post_attention_layernorm_2"),
        },
        loops=LoopKeys(before=None, looped="num_hidden_layers", after=None, count="total_ut_steps", gate=True),
        described=True,
    ),
}
