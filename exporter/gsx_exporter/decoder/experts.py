"""The MLP of a routed layer: every row runs through a few experts, which its router chooses.

The router's product runs in float32, as scores do: a row that goes to another expert differs by far more than a rounded
activation. Letters as in `layer.py`, and E experts; F is the width of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gsx_exporter.decoder.modules import Linear, Mlp
from gsx_exporter.experts import Experts
from gsx_plugins.routed_experts.op import routed_experts


class ExpertWeights(nn.Module):
    """The weights of all experts of a layer, each product's in one tensor: [E, H, F], [E, H, F] and [E, F, H]."""

    def __init__(self, experts: Experts, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        count, width = experts.count, experts.width

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, rows, columns, dtype=dtype), requires_grad=False)

        self.gate_proj, self.up_proj = weights(hidden_size, width), weights(hidden_size, width)
        self.down_proj = weights(width, hidden_size)


class RoutedMlp(nn.Module):
    """Routed experts and, in some families, one expert for all rows with a gate of its own.

    Args:
        experts: their sizes.
        dtype: type of the weights; the router's are float32.
    """

    def __init__(self, experts: Experts, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._experts = experts
        self.gate = Linear(hidden_size, experts.count, False, torch.float32)
        self.experts = ExpertWeights(experts, hidden_size, dtype)
        if experts.shared_width is not None:
            self.shared_expert = Mlp(hidden_size, experts.shared_width, False, dtype)
            self.shared_expert_gate = Linear(hidden_size, 1, False, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[K, H] -> [K, H]."""
        shape, weights = self._experts, self.experts
        logits = self.gate(x.to(torch.float32))
        out = routed_experts(
            x, logits, weights.gate_proj, weights.up_proj, weights.down_proj, shape.per_token, shape.normalized
        )
        if shape.shared_width is None:
            return out
        return out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
