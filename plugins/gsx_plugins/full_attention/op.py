"""`gsx::full_attention` for torch: eager and fake (inference only, so no autograd)."""

from __future__ import annotations

import torch
from torch import Tensor

from gsx_plugins.attention import attend


@torch.library.custom_op("gsx::full_attention", mutates_args=())
def full_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_heads: int, scale: float = 0.0, softcap: float = 0.0
) -> Tensor:
    """Attention of all tokens of the call.

    Args:
        query: [B, S, heads x D], after RoPE.
        key, value: [B, K/V heads, T, D], the whole cache.
        mask: [B, 1, S, T] bool, true where a token may attend.
        num_heads: number of query heads.
        scale: of the scores; 0 for 1/sqrt(D).
        softcap: c of c tanh(score / c), which the scaled scores become; 0 for no cap.
    Returns: [B, S, heads x D], of query's type.
    """
    batch, length, width = query.shape
    split = query.view(batch, length, num_heads, width // num_heads).transpose(1, 2)
    out = attend(split, key, value, mask, scale, softcap)
    return out.transpose(1, 2).reshape(batch, length, width)


@full_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_heads: int, scale: float = 0.0, softcap: float = 0.0
) -> Tensor:
    return torch.empty_like(query)
