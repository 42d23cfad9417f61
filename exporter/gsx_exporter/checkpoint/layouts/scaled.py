"""8-bit codes with scales: FP8 or INT8, one scale for the tensor, a row, a group of inputs or a block.

DeepSeek's and Qwen's FP8 (`weight_scale_inv`, which in spite of its name is multiplied), FBGEMM's, ModelOpt's, and the
unpacked formats of compressed-tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scaled:
    """Codes in `weight`, and their scales beside them; see `Layout`.

    Args:
        scales: the part with the scales.
        by_transformers: see `Layout`.
    """

    method: str
    scales: str
    by_transformers: bool
    codes: str = "weight"
    others: tuple[str, ...] = ("weight_zero_point", "input_scale", "input_zero_point", "activation_scale")

    def shape(self, parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """See `Layout`."""
        check_blocks(parts[self.codes], parts[self.scales])
        return parts[self.codes]

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        return dequantized(parts[self.codes], parts[self.scales], parts.get("weight_zero_point"))


def check_blocks(codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """How many blocks scales of this shape make of codes [out, in], along both axes.

    Raises:
        ValueError: they do not divide them.
    """
    rows, columns = scales if len(scales) == 2 else (math.prod(scales), 1)
    if len(codes) != 2 or len(scales) > 2 or codes[0] % rows or codes[1] % columns:
        raise ValueError(f"codes {list(codes)} with scales {list(scales)}")
    return rows, columns


def dequantized(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """(codes - zeros) * scales, in the type of the scales.

    Args:
        codes: [out, in].
        scales, zeros: one value, [out] for rows, or [r, c]: each for a block of out / r rows and in / c columns.
    Raises:
        ValueError: the numbers of scales or zeros do not divide the codes into blocks.
    """
    (rows, columns), (out, width) = check_blocks(tuple(codes.shape), tuple(scales.shape)), codes.shape
    found = codes.to(scales.dtype).reshape(rows, out // rows, columns, width // columns)
    if zeros is not None:
        if zeros.numel() != scales.numel():
            raise ValueError(f"zeros {list(zeros.shape)} with scales {list(scales.shape)}")
        found = found - zeros.to(scales.dtype).reshape(rows, 1, columns, 1)
    return (found * scales.reshape(rows, 1, columns, 1)).reshape(out, width)
