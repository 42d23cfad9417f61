"""Rotary position embedding: cosines and sines of a call, computed once for all layers.

The frequencies of each kind of scaling come from transformers (`modeling_rope_utils`), which defines what checkpoints
mean. Those of `dynamic` (NTK) depend on the length of the sequence so far, so they are computed in the graph, for each
sequence by itself: transformers takes the longest of a batch, so that the others would depend on their neighbours.
Those of `longrope` follow from the context that a bundle is made for (`ModelConfig.max_positions`): transformers takes
others once a text exceeds the original context, and computes all of the text again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gsx_exporter.config import ModelConfig
from gsx_exporter.rope_config import ONLY_ROPE


class RotaryTables(nn.Module):
    """Positions -> cosines and sines.

    Args:
        hf_config: the transformers configuration (its `rope_parameters` decide the kind).
        config: the model.
        kind: which of the model's kinds of RoPE, a key of `ModelConfig.ropes`.
        dtype: type of the tables; they are computed in float32 first.
    """

    def __init__(self, hf_config: Any, config: ModelConfig, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        rope = config.ropes[kind]
        self.rope_type = rope.get("rope_type", "default")
        self.dtype = dtype
        self.width = width = config.rotary_dim
        self.base = float(rope["rope_theta"])
        self.scaling = 1.0
        of_layers = {} if kind == ONLY_ROPE else {"layer_type": kind}
        cpu = torch.device("cpu")
        with cpu:  # the modules around this one may be built on the meta device
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            if self.rope_type in ("default", "dynamic"):
                frequencies = 1.0 / (self.base**exponents)
            else:
                seen: dict[str, int] = {"seq_len": config.max_positions} if self.rope_type == "longrope" else {}
                frequencies, self.scaling = ROPE_INIT_FUNCTIONS[self.rope_type](hf_config, cpu, **seen, **of_layers)
        self.frequencies: list[float] = frequencies.tolist()
        self.exponents: list[float] = exponents.tolist()
        if self.rope_type == "dynamic":
            self.factor = float(rope["factor"])
            self.original = int(hf_config.max_position_embeddings)  # as transformers does

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] int64 -> cos, sin [1, B x S, W/2], where W is the part of a head that is rotated."""
        angles = position_ids.to(torch.float32).unsqueeze(-1) * self._frequencies(position_ids)
        cos, sin = (table.reshape(1, -1, self.width // 2) for table in (angles.cos(), angles.sin()))
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(self.dtype), sin.to(self.dtype)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """[W/2], or [B, 1, W/2] if they depend on the length of each sequence so far."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32)
        if self.rope_type != "dynamic":
            return frequencies
        # NTK: the base grows with the length so far once that exceeds the original one.
        length = (position_ids.amax(dim=1, keepdim=True) + 1).unsqueeze(2)
        seen = length.to(torch.float32).clamp(min=float(self.original))
        growth = self.factor * seen / self.original - (self.factor - 1.0)
        base = self.base * growth ** (self.width / (self.width - 2))
        return 1.0 / base ** torch.tensor(self.exponents, dtype=torch.float32)
