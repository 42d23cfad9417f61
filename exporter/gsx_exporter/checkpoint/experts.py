"""How checkpoints store routed experts: one tensor for each product of each expert, or all experts of a layer in one.

gsx calls the tensors as Qwen's checkpoints do: `mlp.experts.{j}.gate_proj.weight`, `up_proj`, `down_proj`, and
`mlp.gate.weight` for the router. Mixtral's have other names. transformers' own modules, and checkpoints that were saved
with their names, have `mlp.experts.gate_up_proj` [E, 2F, H], each expert's gate above its up projection, and
`mlp.experts.down_proj` [E, H, F]. transformers translates by the same rules (`conversion_mapping.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gsx_exporter.config import ModelConfig
from gsx_exporter.experts import Experts, Spelling

if TYPE_CHECKING:
    import torch

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_MIXTRAL_BLOCK, _BLOCK = ".block_sparse_moe.", ".mlp."
_FROM_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TO_MIXTRAL = {product: name for name, product in _FROM_MIXTRAL.items()}
# The last word is "weight", or a part of a quantized one.
_MIXTRAL_EXPERT = re.compile(r"(\.mlp\.experts\.\d+)\.(w[123])\.(\w+)$")
_EXPERT = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_FUSED = re.compile(rf"model\.layers\.(\d+)\.mlp\.experts\.({GATE_UP}|{DOWN})$")


@dataclass(frozen=True)
class Piece:
    """A part of a stored tensor: the matrix of one expert, or rows of it.

    Args:
        tensor: the stored tensor's name in its file.
        expert: place on its first axis.
        rows: of that matrix; None for all.
    """

    tensor: str
    expert: int
    rows: tuple[int, int] | None


def named_by_qwen(names: Mapping[str, str], spelling: Spelling) -> dict[str, str]:
    """Tensors under the names that Qwen's checkpoints have for experts.

    Args: names: tensor name, as transformers calls it -> as it is stored.
    """
    if spelling == "qwen":
        return dict(names)
    found = {}
    for name, stored in names.items():
        if _EXPERT.match(name) is None:  # transformers does not know Qwen's names in a Mixtral
            block = name.replace(_MIXTRAL_BLOCK, _BLOCK)
            found[_MIXTRAL_EXPERT.sub(lambda at: f"{at[1]}.{_FROM_MIXTRAL[at[2]]}.{at[3]}", block)] = stored
    return found


def spelling_of(config: ModelConfig) -> Spelling:
    """Whose names a model's checkpoints have for experts."""
    return "qwen" if config.experts is None else config.experts.spelling


def stored_name(name: str, spelling: Spelling) -> str:
    """The name of a routed layer's tensor in the family's checkpoints; other names stay."""
    if spelling == "qwen":
        return name
    expert = _EXPERT.match(name)
    if expert is not None:
        name = f"{expert[1]}.{expert[3]}.{_TO_MIXTRAL[expert[4]]}.weight"
    return name.replace(_BLOCK, _MIXTRAL_BLOCK)


def expert_tensors(experts: Experts, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name within a routed layer and shape of all its MLP's tensors. Linear weights are [out, in], as in torch."""
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts.count, hidden_size)}
    for expert in range(experts.count):
        shapes |= _products(f"mlp.experts.{expert}", experts.width, hidden_size)
    if experts.shared_width is not None:
        shapes |= _products("mlp.shared_expert", experts.shared_width, hidden_size)
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden_size)
    return shapes


def _products(prefix: str, width: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden_size),
        f"{prefix}.up_proj.weight": (width, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, width),
    }


def as_modules(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors as those of transformers' modules, which have all experts of a layer in one."""
    found: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for name, shape in tensors.items():
        expert = _EXPERT.match(name)
        if expert is None:
            found[name] = shape
            continue
        fused = f"{expert[1]}.{DOWN if expert[4] == 'down_proj' else GATE_UP}"
        counts[fused] = max(counts.get(fused, 0), int(expert[3]) + 1)
        rows = shape[0] if expert[4] == "down_proj" else 2 * shape[0]
        found[fused] = (counts[fused], rows, shape[1])
    return found


def of_module(name: str, read: Callable[[str], torch.Tensor], experts: Experts | None) -> torch.Tensor:
    """A parameter of transformers' module, in which a layer's experts share a tensor; of others, the tensor itself.

    Args:
        name: of the parameter.
        read: gives the tensors of single experts, and all others.
        experts: of the model; None if it has none.
    Returns: [E, 2F, H] or [E, H, F] of all experts, gate before up; otherwise as read.
    """
    import torch

    if experts is None or _FUSED.match(name) is None:
        return read(name)
    prefix, _, kind = name.rpartition(".")
    products = (DOWN,) if kind == DOWN else ("gate_proj", "up_proj")
    each = ([read(f"{prefix}.{expert}.{product}.weight") for product in products] for expert in range(experts.count))
    return torch.stack([torch.cat(parts) for parts in each])


def fused_tensors(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of the stored tensors, those with all experts of a layer, and the shapes that they must have."""
    experts, hidden = config.experts, config.hidden_size
    found: dict[str, tuple[int, ...]] = {}
    for name in names if experts is not None else ():
        assert experts is not None
        fused = _FUSED.match(name)
        if fused and int(fused[1]) in experts.layers:
            rows = (hidden, experts.width) if fused[2] == DOWN else (2 * experts.width, hidden)
            found[name] = (experts.count, *rows)
    return found


def pieces_of(fused: Mapping[str, str], experts: Experts) -> dict[str, dict[str, Piece]]:
    """Of tensors that hold all experts of a layer: each one -> tensor of one expert -> where it is in it.

    Args: fused: name -> name in its file.
    """
    return {name: dict(_pieces(name, stored, experts)) for name, stored in fused.items()}


def _pieces(name: str, stored: str, experts: Experts) -> Iterator[tuple[str, Piece]]:
    prefix, _, kind = name.rpartition(".")
    for expert in range(experts.count):
        if kind == DOWN:
            yield f"{prefix}.{expert}.down_proj.weight", Piece(stored, expert, None)
            continue
        for number, product in enumerate(("gate_proj", "up_proj")):
            rows = (number * experts.width, (number + 1) * experts.width)
            yield f"{prefix}.{expert}.{product}.weight", Piece(stored, expert, rows)


def expert_number(name: str) -> int | None:
    """Which expert a tensor belongs to, by its name; None for tensors of no expert."""
    found = _EXPERT.match(name)
    return None if found is None else int(found[3])
