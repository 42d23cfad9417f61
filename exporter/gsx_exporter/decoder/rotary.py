"""Rotary position embedding: cosines and sines of a call, computed once for all layers.

The frequencies of each kind of scaling come from transformers (`modeling_rope_utils`), which defines what checkpoints
mean. `dynamic` (NTK) depends on the length so far, so it is computed in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RotaryTables(nn.Module):
    """Positions -> cosines and sines.

    Args:
        hf_config: the transformers configuration (its `rope_parameters` decide the kind).
        head_dim: D, the width that is rotated.
        dtype: type of the tables; they are computed in float32 first.
    """

    def __init__(self, hf_config: Any, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        rope = hf_config.rope_parameters
        self.kind = rope.get("rope_type", "default")
        self.dtype = dtype
        self.head_dim = head_dim
        self.base = float(rope["rope_theta"])
        self.scaling = 1.0
        cpu = torch.device("cpu")
        with cpu:  # the modules around this one may be built on the meta device
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            if self.kind in ("default", "dynamic"):
                frequencies = 1.0 / (self.base**exponents)
            else:
                frequencies, self.scaling = ROPE_INIT_FUNCTIONS[self.kind](hf_config, cpu)
        self.frequencies: list[float] = frequencies.tolist()
        self.exponents: list[float] = exponents.tolist()
        if self.kind == "dynamic":
            self.factor = float(rope["factor"])
            self.original = int(hf_config.max_position_embeddings)  # as transformers does

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [1, N] int64 -> cos, sin [1, N, D/2]."""
        angles = position_ids.to(torch.float32).unsqueeze(-1) * self._frequencies(position_ids)
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(self.dtype), sin.to(self.dtype)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        if self.kind != "dynamic":
            return torch.tensor(self.frequencies, dtype=torch.float32)
        # NTK: the base grows with the length so far once that exceeds the original one.
        seen = (position_ids.amax(dim=(0, 1)) + 1).to(torch.float32).clamp(min=float(self.original))
        growth = self.factor * seen / self.original - (self.factor - 1.0)
        base = self.base * growth ** (self.head_dim / (self.head_dim - 2))
        return 1.0 / base ** torch.tensor(self.exponents, dtype=torch.float32)
