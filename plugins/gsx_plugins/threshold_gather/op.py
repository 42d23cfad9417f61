"""`gsx::threshold_gather` for torch: eager, fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gsx::threshold_gather", mutates_args=())
def threshold_gather(x: Tensor, score: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x whose score exceeds their threshold, in token order.

    A NaN score is not kept. The rule is that of docs/design.md, section 3, GateSkip `threshold`.

    Args:
        x: [N, H], where N is batch x sequence tokens.
        score: [N] float32.
        threshold: [] float32 for all rows, or [N] with one for each, in the unit of score.
    Returns: rows [K, H] of x's type; index [K] int64, ascending; count [] int64, equal to K. K may be 0.
    """
    index = torch.nonzero(score > threshold).reshape(-1)
    return x.index_select(0, index), index, torch.tensor(index.numel(), dtype=torch.int64)


@threshold_gather.register_fake
def _(x: Tensor, score: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    index = score.new_empty((kept,), dtype=torch.int64)
    return x.new_empty((kept, x.shape[1])), index, score.new_empty((), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.rows = inputs[0].shape[0]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return grad.new_zeros((ctx.rows, grad.shape[1])).index_copy(0, index, grad), None, None


threshold_gather.register_autograd(_backward, setup_context=_setup)
