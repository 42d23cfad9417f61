"""The MLP of a routed layer: every row runs through a few experts, which its router chooses.

The router's product runs in float32, as scores do: a row that goes to another expert differs by far more than a rounded
activation. Letters as in `layer.py`, and E experts; F is the width of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gsx_exporter.decoder.modules import Linear, Mlp
from gsx_exporter.experts import Experts
from gsx_plugins.routed_experts.op import routed_experts, through_experts

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class ExpertWeights(nn.Module):
    """The weights of all experts of a layer, each product's in one tensor: [E, H, F], [E, H, F] and [E, F, H]."""

    def __init__(self, experts: Experts, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        count, width = experts.count, experts.width

        def weights(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, rows, columns, dtype=dtype), requires_grad=False)

        self.gate_proj, self.up_proj = weights(hidden_size, width), weights(hidden_size, width)
        self.down_proj = weights(width, hidden_size)

    def forward(self, rows: Tensor, logits: Tensor, per_token: int, normalized: bool) -> Tensor:
        """[K, H], [K, E] -> [K, H]."""
        return routed_experts(rows, logits, self.gate_proj, self.up_proj, self.down_proj, per_token, normalized)


class StoredExperts(nn.Module):
    """The same for a layer that runs eagerly, to calibrate it: an expert's weights are read when rows go to it.

    All experts of a large model's layer, in float32, would take more memory than all else.

    Args:
        count: number of experts.
        read: from a product ("up_proj") and an expert's number, its weight [in, out] in the type of the rows.
    """

    def __init__(self, count: int, read: Callable[[str, int], Tensor]) -> None:
        super().__init__()
        self._count, self._read = count, read
        self._rounded: dict[str, Callable[[Tensor], Tensor]] = {}

    def weights(self, product: str) -> Iterator[Tensor]:
        """A product's weights, [in, out] each, one expert after the other."""
        return (self._weight(product, expert) for expert in range(self._count))

    def round_weights(self, product: str, rounded: Callable[[Tensor], Tensor]) -> None:
        """From now on round a product's weights, each when it is read."""
        self._rounded[product] = rounded

    def forward(self, rows: Tensor, logits: Tensor, per_token: int, normalized: bool) -> Tensor:
        """[K, H], [K, E] -> [K, H]."""

        def weights(expert: int) -> tuple[Tensor, Tensor, Tensor]:
            return self._weight(GATE, expert), self._weight(UP, expert), self._weight(DOWN, expert)

        return through_experts(rows, logits, weights, per_token, normalized)

    def _weight(self, product: str, expert: int) -> Tensor:
        weight = self._read(product, expert)
        return self._rounded[product](weight) if product in self._rounded else weight


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
        self.experts: ExpertWeights | StoredExperts = ExpertWeights(experts, hidden_size, dtype)
        if experts.shared_width is not None:
            self.shared_expert = Mlp(hidden_size, experts.shared_width, False, dtype)
            self.shared_expert_gate = Linear(hidden_size, 1, False, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[K, H] -> [K, H]."""
        shape, logits = self._experts, self.gate(x.to(torch.float32))
        out: Tensor = self.experts(x, logits, shape.per_token, shape.normalized)
        if shape.shared_width is None:
            return out
        return out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
