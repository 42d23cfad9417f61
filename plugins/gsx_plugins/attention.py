"""Attention in PyTorch, as the two attention ops compute it eagerly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention of queries [B, heads, S, D] to K and V [B, kv heads, T, D].

    Args: mask: [B, 1, S, T] bool; scale: of the scores, 0 for 1/sqrt(D); softcap: 0 for none.
    Returns: [B, heads, S, D].
    """
    if not softcap and not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale or None, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if not softcap:
        # On a GPU PyTorch 2.13 has no kernel of its own for a mask and fewer K/V heads than heads: FlashAttention takes
        # no mask, the memory-efficient one no groups, and cuDNN prepares each new length for itself, which a cache has
        # at every step. Without them all scores would be in memory.
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale or None)
    scores = torch.matmul(query, keys.transpose(2, 3)) * (scale or query.shape[-1] ** -0.5)
    capped = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(capped.float(), dim=-1).to(query.dtype), values)
