"""`gsx::full_attention` for torch: eager and fake (inference only, so no autograd)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("gsx::full_attention", mutates_args=())
def full_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_heads: int) -> Tensor:
    """Attention of all tokens of the call.

    Args:
        query: [B, S, heads x D], after RoPE.
        key, value: [B, K/V heads, T, D], the whole cache.
        mask: [B, 1, S, T] bool, true where a token may attend.
        num_heads: number of query heads.
    Returns: [B, S, heads x D], of query's type. Scores are scaled by 1/sqrt(D).
    """
    batch, length, width = query.shape
    split = query.view(batch, length, num_heads, width // num_heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(split, key, value, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, width)


@full_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(query)
