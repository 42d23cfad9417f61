"""`gsx::routed_experts` for torch: eager and fake (inference only, so no autograd)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("gsx::routed_experts", mutates_args=())
def routed_experts(
    rows: Tensor, logits: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalized: bool
) -> Tensor:
    """Every row through the experts that its router prefers, weighted by their probabilities.

    Args:
        rows: [K, H]; K may be 0.
        logits: [K, E] float32, of the router.
        gate, up: [E, H, F], type of rows; down: [E, F, H].
        top_k: how many experts a row runs through.
        normalized: whether the weights of a row's experts are divided by their sum.
    Returns: [K, H], type of rows. Results are added in float32. Among equal probabilities the expert of
        the lower number comes first.
    """
    return through_experts(rows, logits, lambda expert: (gate[expert], up[expert], down[expert]), top_k, normalized)


@routed_experts.register_fake
def _(rows: Tensor, logits: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalized: bool) -> Tensor:
    return torch.empty_like(rows)


def through_experts(
    rows: Tensor,
    logits: Tensor,
    weights: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    top_k: int,
    normalized: bool,
) -> Tensor:
    """As `routed_experts`. Args: weights: gives those of one expert: gate, up [H, F] and down [F, H]."""
    probabilities = logits.softmax(dim=-1)
    best, experts = (part[:, :top_k] for part in probabilities.sort(dim=-1, descending=True, stable=True))
    if normalized:
        best = best / best.sum(dim=-1, keepdim=True)
    out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for expert in sorted(set(experts.flatten().tolist())):
        index, place = torch.where(experts == expert)
        x, (gate, up, down) = rows[index], weights(expert)
        inner = F.silu(x @ gate) * (x @ up)
        out.index_add_(0, index, (inner @ down).float() * best[index, place, None])
    return out.to(rows.dtype)
