"""`gsx::gated_scatter_add` for torch: eager, fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("gsx::gated_scatter_add", mutates_args=())
def gated_scatter_add(residual: Tensor, rows: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """The residual stream with `gate * rows` added at the rows that index names.

    The rule is that of docs/design.md, section 3: h + g * f(x) for kept tokens, h for skipped ones.

    Args:
        residual: [N, H].
        rows: [K, H]; K may be 0.
        gate: [K, H] or [K, 1].
        index: [K] int64, distinct.
    Returns: [N, H], a new tensor of residual's type.
    """
    return residual.index_add(0, index, gate * rows)


@gated_scatter_add.register_fake
def _(residual: Tensor, rows: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(residual)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, rows, gate, index = inputs
    ctx.save_for_backward(rows, gate, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    rows, gate, index = ctx.saved_tensors
    kept = grad.index_select(0, index)
    grad_gate = kept * rows
    if gate.shape[1] == 1:
        grad_gate = grad_gate.sum(dim=1, keepdim=True)
    return grad, kept * gate, grad_gate, None


gated_scatter_add.register_autograd(_backward, setup_context=_setup)
