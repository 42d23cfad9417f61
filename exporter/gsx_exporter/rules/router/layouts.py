"""Converting the public layouts of routed models into gsx's checkpoint layout (docs/routers.md).

A layout is recognized by the names of its tensors. docs/methods.md, section 10, describes what the released code does
with them. Numbers that a file does not store (tokens that always run, a threshold) are those of the released code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.errors import CheckpointError
from gsx_exporter.router_config import NetConfig, RouterConfig

# D-LLM, `dynamic_reserve_initials`, which its file does not store.
_DLLM_FULL_FIRST = 2


@dataclass(frozen=True)
class Routed:
    """A converted file of routers.

    Args:
        method: the method whose layout the file had.
        tensors: by their names in a gsx checkpoint; the others come from the base.
        router: the routers' configuration.
        whole: whether the file had the model's own weights too.
        left_out: keys that a checkpoint does not store.
    """

    method: str
    tensors: dict[str, Tensor]
    router: RouterConfig
    whole: bool
    left_out: tuple[str, ...] = ()


def convert_routers(source: str, raw: Mapping[str, Any], base: Checkpoint) -> Routed | None:
    """The routers of a file in a known layout; None if it has no routers.

    Args: source: the file, for errors; raw: its tensors by name; base: the model that was trained.
    Raises:
        CheckpointError: a layout whose method gsx does not support, layers that differ, or an incomplete router.
    """
    inner = raw.get("model")
    state = inner if isinstance(inner, Mapping) and any(".router." in key for key in inner) else raw
    for sign, read in _LAYOUTS:
        if any(sign.search(key) for key in state):
            return read(source, {key: _tensor(source, key, value) for key, value in state.items()}, base)
    return None


def _skipgpt(source: str, state: Mapping[str, Tensor], base: Checkpoint) -> Routed:
    """SkipGPT (arXiv:2506.04179): `router_attention` and `router_mlp` next to the wrapped layer `block`."""
    names = {"router_attention": "attn_router", "router_mlp": "mlp_router"}
    inner = {"hidden_layer": "hidden", "weight_predictor": "out"}
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        parts = key.split(".")
        place = parts.index("layers") if "layers" in parts else len(parts)
        head, tail = parts[: place + 2], parts[place + 2 :]
        if tail[:1] == ["block"]:
            tail = tail[1:]
        elif tail and tail[0] in names:
            tail = [names[tail[0]], inner.get(tail[1], tail[1]), *tail[2:]]
        tensors[".".join([*head, *tail])] = tensor
    width = _rows(source, tensors, "attn_router.hidden.weight")
    router = RouterConfig(
        decides="branch",
        reads="layer",
        net=NetConfig(hidden=width),
        output="difference",
        keep_logit=0,
        threshold=0.0,
    )
    return Routed("SkipGPT", tensors, router, "model.embed_tokens.weight" in tensors)


def _dllm(source: str, state: Mapping[str, Tensor], base: Checkpoint) -> Routed:
    """D-LLM: `router.linear_1`, `norm`, `linear_2`, and LoRA weights of Q, K and V, merged into the base's."""
    inner = {"linear_1": "hidden", "norm": "norm", "linear_2": "out"}
    tensors: dict[str, Tensor] = {}
    layers = set()
    for key, tensor in state.items():
        router = re.fullmatch(r"layers\.(\d+)\.router\.(linear_1|norm|linear_2)\.(weight|bias)", key)
        if router is None:
            continue
        layer, module, kind = router.groups()
        layers.add(int(layer))
        tensors[f"model.layers.{layer}.router.{inner[module]}.{kind}"] = tensor
    left_out = [key for key in state if ".router." not in key and ".lora_" not in key]
    tensors |= _merged(source, state, base)
    router_config = RouterConfig(
        layers=tuple(sorted(layers)),
        net=NetConfig(hidden=_rows(source, tensors, "router.hidden.weight"), activation="silu", norm=True),
        output="softmax",
        keep_logit=1,
        threshold=0.5,
        kv_policy="none",
        full_first=_DLLM_FULL_FIRST,
    )
    return Routed("D-LLM", tensors, router_config, False, tuple(left_out))


def _merged(source: str, state: Mapping[str, Tensor], base: Checkpoint) -> dict[str, Tensor]:
    """Q, K and V of the base with D-LLM's low-rank weights added: W + B A, without a factor.

    D-LLM uses the original Llama code, which rotates neighbouring channels of Q and K. Hugging Face's code rotates the
    two halves of a head, so the rows of the added weights are reordered accordingly.
    """
    config = base.config
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    merged = {}
    for key, a in state.items():
        found = re.fullmatch(r"layers\.(\d+)\.attention\.lora_([qkv])\.linear_A\.weight", key)
        if found is None:
            continue
        layer, which = found.groups()
        b = state.get(key.replace("linear_A", "linear_B"))
        if b is None:
            raise CheckpointError(f"{source}: half of a LoRA weight is missing", expected=key.replace("_A", "_B"))
        name = f"model.layers.{layer}.self_attn.{which}_proj.weight"
        weight = base.tensor(name)
        delta = b.float() @ a.float()
        if delta.shape != weight.shape:
            raise CheckpointError(
                f"{source}: {key} does not fit {name}",
                expected=str(list(weight.shape)),
                found=str(list(delta.shape)),
                todo="is --base the model that was trained?",
            )
        if which in heads:
            pairs = delta.view(heads[which], config.head_dim // 2, 2, -1)
            delta = pairs.transpose(1, 2).reshape(weight.shape)
        merged[name] = (weight.float() + delta).to(weight.dtype)
    return merged


def _flexidepth(source: str, state: Mapping[str, Tensor], base: Checkpoint) -> Routed:
    """FlexiDepth (arXiv:2503.23798): a bottleneck `router` and an adapter `router_proj` in the upper layers.

    The router's last two layers have nothing between them, so they become one, `router_head @ router_dec`. The
    adapter's `down_proj` maps to its inner width, and its `up_proj` back.
    """
    renamed = {
        "router.router_enc": "router.hidden",
        "router.router_norm": "router.norm",
        "router_proj.gate_proj": "mlp_adapter.gate_proj",
        "router_proj.down_proj": "mlp_adapter.up_proj",
        "router_proj.up_proj": "mlp_adapter.down_proj",
    }
    tensors: dict[str, Tensor] = {}
    layers = set()
    for key, tensor in state.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(router(?:_proj)?\.\w+)\.weight", key)
        if found is None:
            tensors[key] = tensor
            continue
        layer, module = found.groups()
        prefix = f"model.layers.{layer}."
        layers.add(int(layer))
        if module == "router.router_head":
            dec = state.get(f"{prefix}router.router_dec.weight")
            if dec is None:
                raise CheckpointError(f"{source}: a router is incomplete", expected=f"{prefix}router.router_dec.weight")
            out = (tensor.double() @ dec.double()).float()
            tensors[f"{prefix}router.out.weight"] = out
        elif module != "router.router_dec":
            tensors[f"{prefix}{renamed.get(module, module)}.weight"] = tensor
    router = RouterConfig(
        layers=tuple(sorted(layers)),
        input="post_norm",
        net=NetConfig(hidden=_rows(source, tensors, "router.hidden.weight"), activation="tanh", norm=True, bias=False),
        output="sigmoid",
        threshold=0.5,
        multiplies="mlp",
        adapter=_rows(source, tensors, "mlp_adapter.gate_proj.weight"),
    )
    return Routed("FlexiDepth", tensors, router, "model.embed_tokens.weight" in tensors)


def _unofficial_mod(source: str, state: Mapping[str, Tensor], base: Checkpoint) -> Routed:
    raise CheckpointError(
        f"{source}: comes from a Mixture-of-Depths implementation that differs from the paper",
        expected="layers in which the router's weight multiplies what is added to the residual stream",
        found="router.weight_predictor: there the whole state is multiplied, and one token fewer than k is kept",
        todo="docs/routers.md has the section for models that follow the paper",
    )


def _rows(source: str, tensors: Mapping[str, Tensor], ending: str) -> int:
    """First size of the tensors with that ending, which must be the same in every layer."""
    sizes = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("." + ending) and tensor.ndim == 2}
    if len(sizes) != 1:
        raise CheckpointError(
            f"{source}: {ending} is missing, or differs in width between layers",
            expected="the same width in all layers",
            found=", ".join(map(str, sorted(sizes))) or "no such tensor",
        )
    return sizes.pop()


def _tensor(source: str, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise CheckpointError(
            f"{source}: {key} is not a tensor of floats",
            expected="a state dict: tensors by name",
            found=str(value.dtype) if isinstance(value, Tensor) else type(value).__name__,
        )
    return value.detach()


_Layout = Callable[[str, Mapping[str, Tensor], Checkpoint], Routed]
_LAYOUTS: tuple[tuple[re.Pattern[str], _Layout], ...] = (
    (re.compile(r"layers\.\d+\.router_(attention|mlp)\."), _skipgpt),
    (re.compile(r"^layers\.\d+\.router\.linear_1\."), _dllm),
    (re.compile(r"layers\.\d+\.router\.router_enc\."), _flexidepth),
    (re.compile(r"layers\.\d+\.router\.weight_predictor\."), _unofficial_mod),
)
