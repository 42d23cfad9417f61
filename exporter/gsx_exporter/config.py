"""What the exporter must know about a model: its shape, its family's traits, and its gates or routers.

`ModelConfig` is read once from a checkpoint's `config.json` (through transformers' own configuration classes, so that
their defaults and legacy spellings apply) and passed on as plain values. The `"gsx"` section is described in
docs/design.md, section 5. The families are rows of one table: what differs between them is data, not classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gsx_engines.bundle.words import Branch
from gsx_exporter.errors import CheckpointError
from gsx_exporter.experts import Experts, read_experts
from gsx_exporter.families import FAMILIES, NORMS_BEFORE, SQRT_WIDTH, Family, LayerNorms, LoopKeys, QkNorm
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.rope_config import (
    ONLY_ROPE,
    extended_context,
    read_ropes,
    rotary_dim,
    rotary_kinds,
    switch_lengths,
)
from gsx_exporter.router_config import RouterConfig
from gsx_exporter.section import finite, known_keys, one_of, whole
from gsx_exporter.sphere import UNIT_NORM_EPS, Sphere
from gsx_plugins.errors import UsageError

if TYPE_CHECKING:
    from gsx_engines.bundle.loops import Loops

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2"]
# Names in transformers (`activations.ACT2FN`).
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Scales:
    """Constant factors of a family, and the soft caps c of c tanh(x / c); None for no cap.

    Args:
        embedding: of the embeddings, where the layers read them.
        attention: of the attention scores; None for 1/sqrt(D).
        residual: of what a branch adds to the residual stream.
        logits: of the logits, before their cap.
        attention_cap: of the scaled scores.
        logits_cap: of the logits.
    """

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0
    attention_cap: float | None = None
    logits_cap: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shape and traits of one decoder-only model. Sizes are counts of elements.

    Args:
        family: a key of `FAMILIES`.
        num_layers: how many layers run one after the other; in a looped model, visits of layers (`loops`).
        ropes: the kinds of RoPE, by name, each with the parameters of the Hugging Face configuration (`rope_type`,
            `rope_theta`, and what that type needs).
        rotary: per layer, the name of its kind of RoPE; None for a layer without RoPE.
        rotary_dim: the part of a head that is rotated.
        norms, norm_offset, fused: see `Family`.
        max_positions: the longest text, in tokens. With LongRoPE it decides which factors are used.
        most_positions: the longest text that the model was made for.
        windows: per layer, how many positions a token sees (itself included), or None for all.
        experts: the routed experts; None in a model without.
        loops: how the layers of a looped model run; None where each runs once. All values per layer are per visit.
        rejoins, loop_gate: see `LoopKeys`; False in a model without loops.
        sphere: the factors of a normalized Transformer; None in other models.
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
    most_positions: int
    rms_norm_eps: float
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: QkNorm
    norms: LayerNorms
    norm_offset: float
    activation: Activation
    fused: bool
    scales: Scales
    ropes: Mapping[str, Mapping[str, Any]]
    rotary: tuple[str | None, ...]
    rotary_dim: int
    windows: tuple[int | None, ...]
    experts: Experts | None
    loops: Loops | None
    rejoins: bool
    loop_gate: bool
    sphere: Sphere | None
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

    @property
    def is_plain(self) -> bool:
        """Whether the layers are built like Llama's; biases, norms of heads and windows make no difference."""
        return (
            self.norms == NORMS_BEFORE
            and self.experts is None
            and self.scales == Scales()
            and set(self.rotary) == {ONLY_ROPE}
            and not self.fused
            and self.loops is None
            and self.sphere is None
        )

    @property
    def changes_weights(self) -> bool:
        """Whether some parameters of the decoder are not what is stored (`checkpoint/parameters.py`)."""
        factors = (self.scales.residual, self.scales.logits)
        return self.norm_offset != 0 or factors != (1.0, 1.0) or self.sphere is not None

    @property
    def stored_layers(self) -> int:
        """How many layers have weights."""
        return self.num_layers if self.loops is None else self.loops.layers

    def layer_of(self, number: int) -> int:
        """The layer that has the weights: of a looped model's visit, the one that is visited."""
        return number if self.loops is None else self.loops.visits[number]

    def rope_of(self, layer: int) -> str:
        """The kind of RoPE whose tables a layer is given; one without RoPE does not read them."""
        return self.rotary[layer] or next(iter(self.ropes))

    def is_routed(self, layer: int) -> bool:
        """Whether a layer's MLP consists of routed experts."""
        return self.experts is not None and layer in self.experts.layers

    @property
    def switches(self) -> bool:
        """Whether longer texts than `max_positions` take other factors of LongRoPE."""
        return self.max_positions in switch_lengths(self.ropes) and self.max_positions < self.most_positions

    def of_context(self, positions: int) -> ModelConfig:
        """The same model for texts of up to this many tokens.

        Raises:
            UsageError: the model was not made for so many, or there are none.
        """
        if not 1 <= positions <= self.most_positions:
            raise UsageError(
                "--context: not a context of this model",
                expected=f"1 to {self.most_positions} tokens",
                found=str(positions),
            )
        return replace(self, max_positions=positions)

    def enters_loop(self, number: int) -> bool:
        """Whether a visit begins with another state than the one that left the visit before it (`LoopEntry`)."""
        return (
            self.loops is not None and self.loops.begins(number) and (self.rejoins or self.loops.loop_of(number) != 0)
        )

    def below(self, number: int) -> int:
        """Where a skipped token's K and V are copied from, with the K/V policy `copy`: the layer below; -1 if nowhere.

        In a looped model, the visit of the same layer in the loop before.
        """
        if self.loops is None:
            return number - 1
        return number - self.loops.looped if self.loops.loop_of(number) else -1

    def of_loops(self, loops: Loops) -> ModelConfig:
        """The same looped model with another number of loops."""
        assert self.loops is not None
        assert self.loops.layers == loops.layers
        first = [self.loops.visits.index(layer) for layer in loops.visits]
        return replace(
            self,
            loops=loops,
            num_layers=len(loops.visits),
            rotary=tuple(self.rotary[number] for number in first),
            windows=tuple(self.windows[number] for number in first),
        )

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

        activation = getattr(hf, family.activation)
        if activation not in _ACTIVATIONS:
            raise CheckpointError(
                f"config.json: {family.activation} is not supported",
                expected="one of " + ", ".join(_ACTIVATIONS),
                found=repr(activation),
            )
        _check_shape(hf)
        experts = read_experts(hf, family.experts) if family.experts else None
        if experts is not None and _ACTIVATIONS[activation] != "silu":
            raise CheckpointError(
                f"config.json: {family.activation} is not supported in a model with routed experts",
                expected="silu",
                found=repr(activation),
            )
        ropes = read_ropes(hf, family)
        section = getattr(hf, "gsx", None) or {}
        known_keys("gsx", section, ("method", "gate", "router", "exits", "exit_classifiers"))
        loops = _loops(hf, family.loops) if family.loops else None
        if loops is not None and section:
            raise CheckpointError(
                "config.json: a looped model has a section gsx, and no method says what it means in a loop",
                expected="no such section",
                found=", ".join(section),
            )
        num_layers = hf.num_hidden_layers
        if section.get("gate") and section.get("router"):
            raise CheckpointError(
                "config.json: gsx has gates and routers", expected='one of "gate" and "router": each is a keep rule'
            )
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        rotary, most = rotary_kinds(hf, family, ropes), extended_context(hf.max_position_embeddings, ropes)
        router = RouterConfig.from_dict(section["router"], num_layers) if "router" in section else None
        if router is not None and router.adapter and any(norms.after for norms in family.norms.values()):
            raise CheckpointError(
                f"config.json: gsx.router has an adapter, and no method says what it adds in {hf.model_type}",
                expected="a family without a norm after the branch",
            )
        once = cls(
            family=hf.model_type,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=num_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_dim=head_dim,
            max_positions=min([most, *switch_lengths(ropes)]),
            most_positions=most,
            rms_norm_eps=UNIT_NORM_EPS if family.sphere else hf.rms_norm_eps,
            tied_head=bool(hf.tie_word_embeddings),
            qkv_bias=trait(family.qkv_bias),
            o_bias=trait(family.o_bias),
            mlp_bias=trait(family.mlp_bias),
            qk_norm=family.qk_norm,
            norms=family.norms,
            norm_offset=family.norm_offset,
            activation=_ACTIVATIONS[activation],
            fused=family.fused,
            scales=_scales(hf, family),
            ropes=ropes,
            rotary=rotary,
            rotary_dim=rotary_dim(head_dim, ropes),
            windows=_windows(hf, family),
            experts=experts,
            loops=None,
            rejoins=family.loops is not None and family.loops.rejoins,
            loop_gate=family.loops is not None and family.loops.gate,
            sphere=Sphere.of(hf, family.sphere) if family.sphere else None,
            bos_id=hf.bos_token_id,
            eos_ids=_id_list(hf.eos_token_id),
            pad_id=hf.pad_token_id,
            gate=GateConfig.from_dict(section["gate"], num_layers) if section.get("gate") else None,
            router=router,
            exits=_exits(hf, section, num_layers),
            # After the last layer there is nothing left to skip.
            exit_classifiers=_depths("gsx.exit_classifiers", section.get("exit_classifiers", ()), num_layers - 1),
        )
        if loops is None:
            return once
        return replace(once, loops=loops.model_copy(update={"most": 1, "default": 1})).of_loops(loops)


def _exits(hf: Any, section: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The exits: those of the section `gsx`, else `exit_layer_indices`, as Sorted LLaMA's and Balcony's code has them.

    Raises:
        CheckpointError: the exits have layers of their own.
    """
    if "exits" in section:
        return _depths("gsx.exits", section["exits"], num_layers)
    depths = getattr(hf, "exit_layer_indices", None) or ()
    own = [key for key in ("exit_decoder_layer", "exit_attention", "exit_mlp") if getattr(hf, key, False)]
    if own:
        raise CheckpointError(
            f"config.json: its exits have layers of their own ({own[0]}), which gsx does not read",
            expected="exits that read the model's final norm and head",
            found=f"exit_layer_indices {depths!r}",
            todo=f"the whole model does not need them: remove exit_layer_indices and {', '.join(own)} to export it",
        )
    return _depths("exit_layer_indices", depths, num_layers)


def _depths(key: str, depths: object, deepest: int) -> tuple[int, ...]:
    """A list of depths, without repetition, ascending."""
    if not isinstance(depths, list | tuple):
        raise CheckpointError(
            f"config.json: {key} is not a list of depths", expected="a list of whole numbers", found=repr(depths)
        )
    for depth in depths:
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= deepest:
            raise CheckpointError(
                f"config.json: {key} names a depth that the model does not have",
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
    if hasattr(hf, "rms_norm_eps"):
        finite("rms_norm_eps", hf.rms_norm_eps)
    for key, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        value = getattr(hf, key, causal)
        if bool(value) != causal:
            raise CheckpointError(
                "config.json: the model reads texts in both directions",
                expected=f"{key} {str(causal).lower()}, or no such key",
                found=f"{key} {value!r}",
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


def _scales(hf: Any, family: Family) -> Scales:
    """The family's constant factors, with the configuration's values."""

    def number(key: str | None) -> float:
        if key is None:
            return 1.0
        value = getattr(hf, key)
        finite(key, value)
        return float(value)

    def positive(key: str) -> float:
        value = number(key)
        if value <= 0:
            raise CheckpointError(f"config.json: {key} is not positive", expected="a number above 0", found=str(value))
        return value

    def cap(key: str | None) -> float | None:
        return None if key is None or getattr(hf, key) is None else positive(key)

    attention = positive(family.attention_scale) if family.attention_scale else None
    if family.query_width:
        attention = positive(family.query_width) ** -0.5
    embedding = hf.hidden_size**0.5 if family.embedding_scale == SQRT_WIDTH else number(family.embedding_scale)
    return Scales(
        embedding=embedding,
        attention=attention,
        residual=number(family.residual_scale),
        logits=1 / positive(family.logits_divisor) if family.logits_divisor else 1.0,
        attention_cap=cap(family.attention_softcap),
        logits_cap=cap(family.logits_softcap),
    )


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


def _loops(hf: Any, keys: LoopKeys) -> Loops:
    """How the layers of a looped model run."""
    from gsx_engines.bundle.loops import Loops  # it needs Pydantic, which `benchmarks.gpu_prefill` does without

    def count(key: str | None, least: int) -> int:
        if key is None:
            return 0
        whole(key, getattr(hf, key), least)
        return int(getattr(hf, key))

    before, looped, after = count(keys.before, 0), count(keys.looped, 1), count(keys.after, 0)
    if before + looped + after != hf.num_hidden_layers:
        raise CheckpointError(
            "config.json: the layers before, in and after the loop do not add up",
            expected=f"num_hidden_layers {hf.num_hidden_layers}",
            found=f"{before} + {looped} + {after}",
        )
    most = count(keys.count, 1)
    if keys.caches is not None:
        one_of(keys.caches, getattr(hf, keys.caches), ("per_loop",))
    return Loops(before=before, looped=looped, after=after, most=most, default=most)


def _id_list(ids: int | list[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
