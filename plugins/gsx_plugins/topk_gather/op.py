"""`gsx::topk_gather` for torch: eager, fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gsx::topk_gather", mutates_args=())
def topk_gather(x: Tensor, score: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x with the k best scores, in token order; among equal scores the earlier token wins.

    NaN counts as the lowest finite score. The rule is that of docs/design.md, section 3, GateSkip `rank`.

    Args:
        x: [N, H], where N is batch x sequence tokens.
        score: [N] float32.
        k: [1] int64, 0 <= k <= N.
    Returns: rows [K, H] of x's type; index [K] int64, ascending; count [] int64, equal to K = k.
    """
    ranked = score.nan_to_num(nan=torch.finfo(score.dtype).min, posinf=float("inf"), neginf=float("-inf"))
    order = torch.sort(ranked, descending=True, stable=True).indices
    index = order[: int(k)].sort().values
    return x.index_select(0, index), index, k.reshape(()).clone()


@topk_gather.register_fake
def _(x: Tensor, score: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    index = score.new_empty((kept,), dtype=torch.int64)
    return x.new_empty((kept, x.shape[1])), index, k.new_empty(())


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.rows = inputs[0].shape[0]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return grad.new_zeros((ctx.rows, grad.shape[1])).index_copy(0, index, grad), None, None


topk_gather.register_autograd(_backward, setup_context=_setup)
