"""INT4 and INT8 codes packed into 32-bit words, as compressed-tensors' format `pack-quantized` has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gsx_exporter.checkpoint.layouts.scaled import check_blocks, dequantized

if TYPE_CHECKING:
    import torch

_WORD_BITS = 32


@dataclass(frozen=True)
class Packed:
    """Codes of 2, 4 or 8 bits along the inputs, the first in the lowest bits, plus half of their range; see `Layout`.

    `weight_packed` is [out, in x bits / 32], `weight_zero_point`, packed along the outputs, [out x bits / 32, groups].

    Args: bits: of a code.
    """

    method: str
    bits: int
    by_transformers: bool = True
    codes: str = "weight_packed"
    scales: str = "weight_scale"
    others: tuple[str, ...] = ("weight_shape", "weight_zero_point", "input_scale", "input_zero_point")

    def shape(self, parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """See `Layout`."""
        out, words = parts[self.codes]
        shape = out, words * _WORD_BITS // self.bits
        check_blocks(shape, parts[self.scales])
        return shape

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        scales, zeros = parts[self.scales], parts.get("weight_zero_point")
        half = 1 << (self.bits - 1)
        codes = unpacked(parts[self.codes], self.bits) - half
        if zeros is not None:
            zeros = unpacked(zeros.t(), self.bits).t()[: len(scales)] - half
        return dequantized(codes, scales, zeros)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 32-bit words: [n, w] int32 -> [n, w x 32 / bits] int16, in 0 to 2^bits - 1, the lowest bits first."""
    import torch

    lanes = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    codes = (words[..., None] >> lanes) & ((1 << bits) - 1)
    return codes.to(torch.int16).flatten(-2)
