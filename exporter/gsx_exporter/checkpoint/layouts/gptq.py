"""GPTQ's layout (AutoGPTQ, GPTQModel): codes packed along the inputs, groups of inputs, in any order.

`qweight` [in x bits / 32, out] int32, `qzeros` [groups, out x bits / 32] int32, `scales` [groups, out], and
`g_idx` [in], the group of each input. weight = (code - zero) * scale; the first version of the
format stores zeros less by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gsx_exporter.checkpoint.layouts.packed import unpacked

if TYPE_CHECKING:
    import torch

_WORD_BITS = 32


@dataclass(frozen=True)
class Gptq:
    """See `Layout`.

    Args:
        bits: of a code: 2, 4 or 8.
        zero_offset: what is added to a stored zero: 1 in the first version of the format.
    """

    bits: int
    zero_offset: int
    method: str = "GPTQ"
    by_transformers: bool = False
    codes: str = "qweight"
    scales: str = "scales"
    others: tuple[str, ...] = ("qzeros", "g_idx")

    def shape(self, parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """See `Layout`."""
        words, out = parts[self.codes]
        width, (groups, columns) = words * _WORD_BITS // self.bits, parts[self.scales]
        zeros = (groups, out * self.bits // _WORD_BITS)
        if columns != out or parts.get("qzeros") != zeros or parts.get("g_idx", (width,)) != (width,):
            raise ValueError(", ".join(f"{part} {list(shape)}" for part, shape in parts.items()))
        return out, width

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        import torch

        scales = parts[self.scales]
        groups = len(scales)
        codes = unpacked(parts[self.codes].t(), self.bits)
        # A zero of 0 is stored as 2^bits - 1 in the first version.
        zeros = (unpacked(parts["qzeros"], self.bits) + self.zero_offset) & ((1 << self.bits) - 1)
        width = codes.shape[1]
        index = parts.get("g_idx", torch.arange(width) // (width // groups)).long()
        if int(index.max()) >= groups or int(index.min()) < 0:
            raise ValueError(f"{groups} groups, and g_idx from {int(index.min())} to {int(index.max())}")
        steps = (codes - zeros.t()[:, index]).to(scales.dtype)
        return steps.mul_(scales.t()[:, index])
