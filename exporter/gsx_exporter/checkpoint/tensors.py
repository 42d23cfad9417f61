"""The tensors that a checkpoint must have, by name and shape, and what each belongs to."""

from __future__ import annotations

from gsx_exporter.checkpoint.experts import expert_tensors
from gsx_exporter.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FINAL_NORM = "norm.weight"
LOOP_GATE = "early_exit_gate"
LOGIT_SCALE = "lm_head.logit_scale"
FUSED_QKV, FUSED_GATE_UP = "qkv_proj", "gate_up_proj"
# After a layer: predicts whether the layers above would still change the model's answer (CALM).
EXIT_CLASSIFIER = "exit_classifier"
# Of a branch: the linear score of its gate (`GateConfig.score`).
GATE_SCORE = "gate_score"
# Modules of a layer that belong to a keep rule, not to the plain model, and what messages call them.
_RULE_MODULES = {
    EXIT_CLASSIFIER: "exit classifier",
    **dict.fromkeys(("attn_gate", "mlp_gate", f"attn_{GATE_SCORE}", f"mlp_{GATE_SCORE}"), "gate"),
    **{f"{prefix}router{suffix}": "router" for prefix in ("", "attn_", "mlp_") for suffix in ("", "_predictor")},
    "mlp_adapter": "router",
}
_ADAPTER_PARTS = {"base_model", "base_layer", "lora_A", "lora_B"}


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with this configuration must have, as transformers calls it.

    Linear weights are [out, in], as in torch.
    """
    H = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, H)}
    for i in range(config.stored_layers):
        p = f"model.layers.{i}."
        routed = config.is_routed(i)
        for name, out, width, bias in (*_of_attention(config), *(() if routed else _of_mlp(config))):
            shapes[f"{p}{name}.weight"] = (out, width)
            if bias:
                shapes[f"{p}{name}.bias"] = (out,)
        if config.experts is not None and routed:
            shapes |= {p + name: shape for name, shape in expert_tensors(config.experts, H).items()}
        if config.sphere is not None:
            shapes |= {p + name: (width,) for name, width in _of_sphere(config).items()}
        for norms in config.norms.values() if config.sphere is None else ():
            shapes |= {f"{p}{norm}.weight": (H,) for norm in (norms.before, norms.after) if norm}
        if config.qk_norm != "none" and config.sphere is None:
            heads = (config.num_heads, config.num_kv_heads) if config.qk_norm == "width" else (1, 1)
            for name, count in zip(("q_norm", "k_norm"), heads, strict=True):
                shapes[f"{p}self_attn.{name}.weight"] = (count * config.head_dim,)
        if config.gate:
            rows = H if config.gate.kind == "vector" else 1
            for branch in config.gate.branches:
                shapes[f"{p}{branch}_gate.weight"] = (rows, H)
                shapes[f"{p}{branch}_gate.bias"] = (rows,)
                if config.gate.score == "linear":
                    shapes |= {f"{p}{branch}_{GATE_SCORE}.weight": (1, H), f"{p}{branch}_{GATE_SCORE}.bias": (1,)}
        if i + 1 in config.exit_classifiers:
            shapes[f"{p}{EXIT_CLASSIFIER}.weight"] = (1, H)
            shapes[f"{p}{EXIT_CLASSIFIER}.bias"] = (1,)
        if config.router and i in config.router.routed(config.num_layers):
            shapes |= {p + name: shape for name, shape in config.router.shapes(H).items()}
    if config.loop_gate:
        shapes |= {f"model.{LOOP_GATE}.weight": (1, H), f"model.{LOOP_GATE}.bias": (1,)}
    if config.sphere is None:
        shapes[f"model.{FINAL_NORM}"] = (H,)
    else:
        shapes[LOGIT_SCALE] = (config.vocab_size,)
    if not config.tied_head:
        shapes[HEAD] = (config.vocab_size, H)
    return shapes


# A linear layer: name, outputs, inputs, and whether it has a bias.
_Product = tuple[str, int, int, bool]


def _of_attention(config: ModelConfig) -> list[_Product]:
    H = config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    out: _Product = ("self_attn.o_proj", H, q, config.o_bias)
    if config.fused:
        return [(f"self_attn.{FUSED_QKV}", q + 2 * kv, H, config.qkv_bias), out]
    widths = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    gate: list[_Product] = [("self_attn.gate_proj", q, H, False)] if config.sphere is not None else []
    return [*((name, width, H, config.qkv_bias) for name, width in widths.items()), *gate, out]


def _of_sphere(config: ModelConfig) -> dict[str, int]:
    """The factors for each channel in a layer of a normalized Transformer: name -> width."""
    H, F, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    branches = {"lambda_1": H, "lambda_2": H, "mlp.suv_gate": F, "mlp.suv_up": F}
    return {"self_attn.sqk": q, "self_attn.s_gate": q, **branches}


def _of_mlp(config: ModelConfig) -> list[_Product]:
    H, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    down: _Product = ("mlp.down_proj", H, F, bias)
    if config.fused:
        return [(f"mlp.{FUSED_GATE_UP}", 2 * F, H, bias), down]
    return [("mlp.gate_proj", F, H, bias), ("mlp.up_proj", F, H, bias), down]


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to a LoRA adapter that is not merged, by its name (as PEFT gives it)."""
    return not _ADAPTER_PARTS.isdisjoint(name.split("."))


def is_gate(name: str) -> bool:
    """Whether a tensor belongs to a gate, by its name."""
    return rule_module_kind(name) == "gate"


def rule_module_kind(name: str) -> str | None:
    """Which module of a keep rule a tensor belongs to, by its name: "gate", "router" or "exit classifier".

    None for tensors of the model itself.
    """
    return next((_RULE_MODULES[part] for part in name.split(".") if part in _RULE_MODULES), None)
