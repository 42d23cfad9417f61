"""`gsx::gathered_attention` for torch: eager and fake (inference only, so no autograd)."""

from __future__ import annotations

import torch
from torch import Tensor

from gsx_plugins.attention import attend


@torch.library.custom_op("gsx::gathered_attention", mutates_args=())
def gathered_attention(
    query: Tensor,
    index: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of the query rows that index names to the keys and values of all tokens.

    The rule is that of docs/methods.md, 3.6: keys and values of every position, queries only of kept tokens.

    Args:
        query: [K, heads x D], after RoPE; K may be 0.
        index: [K] int64, ascending: positions in the flattened B x S tokens.
        key, value: [B, K/V heads, T, D], the whole cache.
        mask: [B, 1, S, T] bool, true where a token may attend; every token attends at least to itself.
        num_heads: number of query heads.
        scale: of the scores; 0 for 1/sqrt(D).
        softcap: c of c tanh(score / c), which the scaled scores become; 0 for no cap.
    Returns: [K, heads x D], of query's type.
    """
    rows = torch.zeros_like(query)
    batch, _, length, _ = mask.shape
    for b in range(batch):  # one attention per sequence, for its own kept rows
        mine = (index >= b * length) & (index < (b + 1) * length)
        count = int(mine.sum())
        if not count:
            continue
        q = query[mine].view(count, num_heads, -1).transpose(0, 1).unsqueeze(0)
        seen = mask[b, 0].index_select(0, index[mine] - b * length)
        out = attend(q, key[b : b + 1], value[b : b + 1], seen[None, None], scale, softcap)
        rows[mine] = out[0].transpose(0, 1).reshape(count, -1)
    return rows


@gathered_attention.register_fake
def _(
    query: Tensor,
    index: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    return torch.empty_like(query)
