"""Linear layers and the MLP, for the model itself and for the modules of a keep rule.

Letters as in `layer.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A linear layer whose weight is [in, out]."""

    def __init__(self, width: int, out: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, out, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class Mlp(nn.Module):
    """A gated linear unit: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias, dtype)
        self.up_proj = Linear(hidden_size, width, bias, dtype)
        self.down_proj = Linear(width, hidden_size, bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[K, H] -> [K, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
