"""The products of each layer, by name: those of a plain layer, and those of a layer with routed experts.

The weights of all experts of a layer are one matrix here, since they are one tensor in the graph, and are rounded
expert by expert. In a routed layer only the weights of the MLP are quantized, never its inputs: an expert sees few
tokens of a text, too few to find a scale for all that it may see.
"""

from __future__ import annotations

from gsx_exporter.config import ModelConfig
from gsx_exporter.quantization.scheme import GROUPS

_QKV, _HEAD_GATE = "self_attn.qkv", ("self_attn.gate_proj",)
_PLAIN_MLP = ("mlp.gate_up", "mlp.down")
# Groups of a routed layer's MLP: of all experts, and of the one that runs for every token.
_EXPERTS: dict[str, tuple[str, ...]] = {
    "mlp.experts.gate_up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "mlp.experts.down": ("mlp.experts.down_proj",),
}
_SHARED_EXPERT: dict[str, tuple[str, ...]] = {
    "mlp.shared_expert.gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_expert.down": ("mlp.shared_expert.down_proj",),
}
_OF_ALL_EXPERTS = tuple(name for names in _EXPERTS.values() for name in names)
_ROUTED = (*_OF_ALL_EXPERTS, *(name for names in _SHARED_EXPERT.values() for name in names))


def prefix_of(config: ModelConfig, number: int) -> str:
    """What the names of a layer's matrices begin with; visits of a looped layer share them."""
    return f"layers.{config.layer_of(number)}."


def groups_in(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """A layer's groups of products that read the same values, in order."""
    if config.sphere is not None:  # which has a gate on attention's heads
        return {name: (*names, *_HEAD_GATE) if name == _QKV else names for name, names in GROUPS.items()}
    if not config.is_routed(layer):
        return dict(GROUPS)
    assert config.experts is not None
    plain = {group: names for group, names in GROUPS.items() if group not in _PLAIN_MLP}
    return {**plain, **_EXPERTS, **({} if config.experts.shared_width is None else _SHARED_EXPERT)}


def products_in(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """A layer's products, in order."""
    return tuple(name for names in groups_in(config, layer).values() for name in names)


def linears_in(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """Those of a layer's products whose inputs are measured, and may be quantized."""
    return tuple(name for name in products_in(config, layer) if name not in _ROUTED)


def is_routed(product: str) -> bool:
    """Whether a product belongs to the MLP of a routed layer, of which only weights are quantized."""
    return product.endswith(_ROUTED)


def is_stack(product: str) -> bool:
    """Whether a product's matrix has the weights of all experts of a layer, [E, in, out]."""
    return product.endswith(_OF_ALL_EXPERTS)


def input_width(config: ModelConfig, product: str) -> int:
    """The input width of one of a layer's products."""
    if product.endswith("o_proj"):
        return config.num_heads * config.head_dim
    if not product.endswith("down_proj"):
        return config.hidden_size
    if not is_routed(product):
        return config.intermediate_size
    assert config.experts is not None
    width = config.experts.width if is_stack(product) else config.experts.shared_width
    assert width is not None
    return width
