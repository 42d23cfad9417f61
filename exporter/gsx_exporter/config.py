"""What the exporter must know about a model: its shape, its family's traits, and its gates or routers.

`ModelConfig` is read once from a checkpoint's `config.json` (through transformers' own configuration classes, so that
their defaults and legacy spellings apply) and passed on as plain values. The `"gsx"` section is described in
docs/design.md, section 5. The families are rows of one table: what differs between them is data, not classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.errors import CheckpointError
from gsx_exporter.experts import ExpertKeys, Experts, read_experts
from gsx_exporter.router_config import RouterConfig
from gsx_exporter.section import finite, known_keys, one_of, whole

GateKind = Literal["vector", "scalar"]
GateInput = Literal["post_norm", "pre_norm"]


@dataclass(frozen=True)
class Family:
    """Traits of a model family that its configuration does not state.

    Args:
        qkv_bias: whether Q, K and V have a bias, or the configuration key that says so.
        o_bias: the same for the output projection.
        mlp_bias: the same for the MLP.
        qk_norm: whether Q and K are normalized per head (RMSNorm) before RoPE.
        windows: which layers `sliding_window` applies to: none (the key is ignored), all, or those that `layer_types`
            names.
        experts: the keys that describe routed experts; None in a family without.
    """

    qkv_bias: str | bool
    o_bias: str | bool
    mlp_bias: str | bool
    qk_norm: bool
    windows: Literal["none", "all", "layer_types"]
    experts: ExpertKeys | None = None


# From the modelling code of transformers 5 (`models/<family>/modeling_<family>.py`).
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", qk_norm=False, windows="none"
    ),
    "mistral": Family(qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, windows="all"),
    "qwen2": Family(qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False, windows="layer_types"),
    "qwen3": Family(
        qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=False, qk_norm=True, windows="layer_types"
    ),
    "mixtral": Family(
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows="all",
        experts=ExpertKeys(
            count="num_local_experts", width="intermediate_size", normalized=True, by_layer=False, spelling="mixtral"
        ),
    ),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias",
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows="layer_types",
        experts=ExpertKeys(shared_width="shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        windows="all",
        experts=ExpertKeys(),
    ),
}

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
# Names of x * sigmoid(x) in transformers (`activations.ACT2FN`).
_SILU = ("silu", "swish")


@dataclass(frozen=True)
class GateConfig:
    """The gates of a checkpoint: `config.json`, section `"gsx"`, key `"gate"`.

    Args:
        kind: `vector` (W [H, H]) or `scalar` (W [1, H]).
        input: what the gate reads: the branch's normalized input (`post_norm`) or the residual stream (`pre_norm`).
        branches: which branches of every layer have a gate.
    """

    kind: GateKind = "vector"
    input: GateInput = "post_norm"
    branches: tuple[Branch, ...] = BRANCHES

    def __post_init__(self) -> None:
        one_of("gsx.gate.kind", self.kind, ("vector", "scalar"))
        one_of("gsx.gate.input", self.input, ("post_norm", "pre_norm"))
        for branch in self.branches:
            one_of("gsx.gate.branches", branch, BRANCHES)
        if not self.branches or len(set(self.branches)) != len(self.branches):
            raise CheckpointError(
                "config.json: gsx.gate.branches is not a list of distinct branches",
                expected='one or both of "attn", "mlp"',
                found=repr(list(self.branches)),
            )

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> GateConfig:
        """Read the section.

        Raises:
            CheckpointError: an unknown key, or a value that is not allowed.
        """
        known_keys("gsx.gate", section, ("kind", "input", "branches"))
        values = dict(section)
        if "branches" in values:
            listed = values["branches"]
            values["branches"] = tuple(listed) if isinstance(listed, list | tuple) else (listed,)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The section as `config.json` stores it."""
        return {"kind": self.kind, "input": self.input, "branches": list(self.branches)}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and traits of one decoder-only model. Sizes are counts of elements.

    Args:
        family: a key of `FAMILIES`.
        rope: `rope_parameters` of the Hugging Face configuration: `rope_type`, `rope_theta`, and what that type needs.
        windows: per layer, how many positions a token sees (itself included), or None for all.
        experts: the routed experts; None in a model without.
        eos_ids: end-of-text tokens, which are always kept (docs/design.md, section 3).
        gate: the gates; None without them.
        router: the routers; None without them. A checkpoint has gates, routers or neither.
        exits: exit depths that the checkpoint was trained for (LayerSkip, Sorted LLaMA); may be empty.
        exit_classifiers: depths, ascending, after which a classifier predicts whether the layers above would still
            change the model's answer (CALM); may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]
    windows: tuple[int | None, ...]
    experts: Experts | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    gate: GateConfig | None
    router: RouterConfig | None
    exits: tuple[int, ...]
    exit_classifiers: tuple[int, ...]

    @property
    def gated_branches(self) -> tuple[Branch, ...]:
        """Branches that have a gate; empty for a dense model."""
        return self.gate.branches if self.gate else ()

    def is_routed(self, layer: int) -> bool:
        """Whether a layer's MLP consists of routed experts."""
        return self.experts is not None and layer in self.experts.layers

    @classmethod
    def from_hf(cls, hf: Any) -> ModelConfig:
        """From a transformers configuration object.

        Raises:
            CheckpointError: an unsupported family, activation or RoPE kind, or a malformed `"gsx"` section.
        """
        family = FAMILIES.get(hf.model_type)
        if family is None:
            raise CheckpointError(
                f"config.json: model_type {hf.model_type!r} is not supported",
                expected="one of " + ", ".join(FAMILIES),
                found=hf.model_type,
            )

        def trait(value: str | bool) -> bool:
            return bool(getattr(hf, value, False)) if isinstance(value, str) else value

        if hf.hidden_act not in _SILU:
            raise CheckpointError(
                "config.json: hidden_act is not supported", expected=" or ".join(_SILU), found=repr(hf.hidden_act)
            )
        _check_shape(hf)
        rope = _rope(hf)
        section = getattr(hf, "gsx", None) or {}
        known_keys("gsx", section, ("method", "gate", "router", "exits", "exit_classifiers"))
        num_layers = hf.num_hidden_layers
        if section.get("gate") and section.get("router"):
            raise CheckpointError(
                "config.json: gsx has gates and routers", expected='one of "gate" and "router": each is a keep rule'
            )
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        return cls(
            family=hf.model_type,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=num_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=head_dim,
            max_positions=_context(hf.max_position_embeddings, rope),
            rms_norm_eps=hf.rms_norm_eps,
            tied_head=bool(hf.tie_word_embeddings),
            qkv_bias=trait(family.qkv_bias),
            o_bias=trait(family.o_bias),
            mlp_bias=trait(family.mlp_bias),
            qk_norm=family.qk_norm,
            rope=rope,
            windows=_windows(hf, family),
            experts=read_experts(hf, family.experts) if family.experts else None,
            bos_id=hf.bos_token_id,
            eos_ids=_id_list(hf.eos_token_id),
            pad_id=hf.pad_token_id,
            gate=GateConfig.from_dict(section["gate"]) if section.get("gate") else None,
            router=RouterConfig.from_dict(section["router"], num_layers) if "router" in section else None,
            exits=_depths("exits", section, num_layers),
            # After the last layer there is nothing left to skip.
            exit_classifiers=_depths("exit_classifiers", section, num_layers - 1),
        )


def _depths(key: str, section: Mapping[str, Any], deepest: int) -> tuple[int, ...]:
    """A list of depths from the section `gsx`, without repetition, ascending."""
    depths = section.get(key, ())
    if not isinstance(depths, list | tuple):
        raise CheckpointError(
            f"config.json: gsx.{key} is not a list of depths", expected="a list of whole numbers", found=repr(depths)
        )
    for depth in depths:
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= deepest:
            raise CheckpointError(
                f"config.json: gsx.{key} names a depth that the model does not have",
                expected=f"whole numbers from 1 to {deepest}",
                found=repr(depth),
            )
    return tuple(sorted(set(depths)))


def _check_shape(hf: Any) -> None:
    """Refuse sizes that no model has. Their types were checked by transformers."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "max_position_embeddings"):
        whole(name, getattr(hf, name), 1)
    for name in ("num_key_value_heads", "head_dim"):
        if getattr(hf, name, None) is not None:
            whole(name, getattr(hf, name), 1)
    if (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads) % 2:
        raise CheckpointError("config.json: head_dim is odd", expected="an even number, since RoPE rotates pairs")
    finite("rms_norm_eps", hf.rms_norm_eps)
    if not getattr(hf, "is_causal", True):
        raise CheckpointError(
            "config.json: the model reads texts in both directions",
            expected="is_causal true, or no such key",
            found=f"is_causal {hf.is_causal!r}",
            todo="only models that write text from left to right can be exported",
        )
    if getattr(hf, "is_heterogeneous", False):
        raise CheckpointError("config.json: its layers differ in shape", expected="one shape for all layers")
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads or hf.num_attention_heads
    if heads % kv_heads:
        raise CheckpointError(
            "config.json: the heads cannot be divided among those of K and V",
            expected=f"num_attention_heads {heads} to be a multiple of num_key_value_heads",
            found=str(kv_heads),
        )
    pad = hf.pad_token_id
    if pad is not None and not -hf.vocab_size <= pad < hf.vocab_size:
        raise CheckpointError(
            "config.json: pad_token_id is not in the vocabulary, and transformers cannot build such a model",
            expected=f"an id below {hf.vocab_size}",
            found=str(pad),
            todo="set it to null: gsx pads nothing with it",
        )


def _rope(hf: Any) -> dict[str, Any]:
    """The RoPE parameters, checked."""
    rope = dict(hf.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            "config.json: this kind of RoPE scaling is not supported",
            expected="one of " + ", ".join(ROPE_KINDS),
            found=repr(kind),
        )
    finite("rope_theta", rope.get("rope_theta"))
    if kind in ("linear", "dynamic"):  # the other kinds find a factor themselves where there is none
        finite("the factor of RoPE scaling", rope.get("factor"))
    # In its plain form the supported families' RoPE does not read the share of a head that is rotated.
    if kind != "default" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            "config.json: a partial rotary embedding is not supported",
            expected="partial_rotary_factor 1.0",
            found=str(rope["partial_rotary_factor"]),
        )
    return rope


def _context(positions: int, rope: Mapping[str, Any]) -> int:
    """The number of positions that the model was made for.

    Scaled RoPE extends the context over `max_position_embeddings`, which model cards advise to leave as it is: to the
    factor times the original length (vLLM reads it so).
    """
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        return positions
    original = rope.get("original_max_position_embeddings")
    return max(positions, int(factor * (original if isinstance(original, int) else positions)))


def _windows(hf: Any, family: Family) -> tuple[int | None, ...]:
    """The sliding window of each layer, as transformers' masks apply it (a window of w sees w positions)."""
    window = getattr(hf, "sliding_window", None)
    layers = hf.num_hidden_layers
    if family.windows == "none":
        kinds = ["full_attention"] * layers
    elif family.windows == "all":
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    else:
        kinds = hf.layer_types
    for kind in kinds:
        one_of("layer_types", kind, ("full_attention", "sliding_attention"))
    if "sliding_attention" in kinds:
        whole("sliding_window", window, 1)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _id_list(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
