"""Linear layers and the MLP, for the model itself and for the modules of a keep rule.

Letters as in `layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsx_exporter.config import Activation


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Functions with names, so that a module can be pickled (`graph/trace.py`).
_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu2": _relu2,
}


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


class WidenedLinear(Linear):
    """A linear layer whose weight is widened to float32, for inputs in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] float32 -> [.., out] float32."""
        y = torch.matmul(x, self.weight.to(torch.float32))
        return y if self.bias is None else y + self.bias


class Mlp(nn.Module):
    """A gated linear unit: down(norm(activation(gate(x)) * up(x))).

    Args: norm: of the inner state; None for none.
    Attributes: rows_at_a_time: None for all; fewer where memory counts, since the inner state is a layer's widest.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        bias: bool,
        dtype: torch.dtype,
        activation: Activation = "silu",
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.gate_proj = Linear(hidden_size, width, bias, dtype)
        self.up_proj = Linear(hidden_size, width, bias, dtype)
        self.norm = norm
        self.down_proj = Linear(width, hidden_size, bias, dtype)
        self.rows_at_a_time: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[K, H] -> [K, H]."""
        if self.rows_at_a_time is None:
            return self._of(x)
        return torch.cat([self._of(rows) for rows in torch.split(x, self.rows_at_a_time)])

    def _of(self, x: Tensor) -> Tensor:
        inner = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner if self.norm is None else self.norm(inner))
