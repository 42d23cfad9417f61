"""Weights as codes, and rounding to the nearest code.

A weight [in, out] becomes codes of the same shape, with scales (and zero-points) [blocks, out]; one block if a whole
output channel shares a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gsx_exporter.graph.weights import FOUR_BITS
from gsx_exporter.quantization.scheme import WeightFormat

# Scale of a channel that is zero throughout: a scale must be above 0.
SMALLEST_SCALE = 2.0**-24  # the smallest number above 0 in half precision
# INT4 codes with zero-points.
_LOWEST, _HIGHEST = -8.0, 7.0
# Weights that are widened and rounded at a time: a table of a large model would take several times its size.
_AT_A_TIME = 1 << 25
# Shares of a block's range that are tried for its scale: the ends may cost less than a finer step gains.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Encoded:
    """A weight as codes.

    Args:
        format: of the codes.
        codes: [in, out], int8 (INT4 codes too), or E4M3.
        scales: [blocks, out], in the type of the product.
        zero_points: [blocks, out] int8; None if they are 0.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None

    def decoded(self) -> Tensor:
        """The weight that the codes stand for, [in, out] float32."""
        weight = self.codes.to(torch.float32, memory_format=torch.contiguous_format)
        blocks = weight.view(len(self.scales), -1, weight.shape[1])
        if self.zero_points is not None:
            blocks.sub_(self.zero_points[:, None])
        blocks.mul_(self.scales[:, None])
        return weight


def round_to_nearest(weight: Tensor, form: WeightFormat, dtype: torch.dtype) -> Encoded:
    """Codes of a weight [in, out], of any float type. For an embedding [rows, width], pass the transpose: each row has
    its scale.

    Args: dtype: of the scales.
    """
    channels = torch.split(weight, max(1, _AT_A_TIME // len(weight)), dim=1)
    parts = [_rounded(some.to(torch.float32), form, dtype) for some in channels]
    if len(parts) == 1:
        return parts[0]
    zeros = [one.zero_points for one in parts if one.zero_points is not None]
    codes, scales = torch.cat([one.codes for one in parts], 1), torch.cat([one.scales for one in parts], 1)
    return Encoded(form, codes, scales, torch.cat(zeros, 1) if zeros else None)


def _rounded(weight: Tensor, form: WeightFormat, dtype: torch.dtype) -> Encoded:
    """Codes of some output channels."""
    blocks = weight.reshape(-1, form.block_size or len(weight), weight.shape[1])
    scales, zeros = ranges(blocks, form, dtype)
    codes = round_values(blocks, scales[:, None], None if zeros is None else zeros[:, None], form).flatten(0, 1)
    return encoded(codes, scales, zeros, form)


def encoded(codes: Tensor, scales: Tensor, zeros: Tensor | None, form: WeightFormat) -> Encoded:
    """Codes (float32, whole numbers or values of E4M3) and zero-points in the types that they are stored in."""
    stored = torch.int8 if form.dtype == FOUR_BITS else form.dtype
    return Encoded(form, codes.to(stored), scales, None if zeros is None else zeros.to(torch.int8))


def ranges(blocks: Tensor, form: WeightFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales [blocks, out], and zero-points if the format has them, of blocks [blocks, size, out]."""
    if not form.zero_points:
        return (blocks.abs().amax(dim=1) / form.largest).clamp(min=SMALLEST_SCALE).to(dtype), None
    lowest, highest = blocks.amin(dim=1).clamp(max=0), blocks.amax(dim=1).clamp(min=0)
    least: Tensor | None = None
    for share in _RANGES:
        scales = ((highest - lowest) * share / (_HIGHEST - _LOWEST)).clamp(min=SMALLEST_SCALE).to(dtype)
        zeros = (_LOWEST - lowest * share / scales.float()).round().clamp(_LOWEST, _HIGHEST)
        codes = round_values(blocks, scales[:, None], zeros[:, None], form)
        error = ((codes - zeros[:, None]) * scales[:, None].float() - blocks).square().sum(dim=1)
        if least is None:
            least, best_scales, best_zeros = error, scales, zeros
        else:
            better = error < least
            least = torch.minimum(error, least)
            best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def round_values(values: Tensor, scales: Tensor, zeros: Tensor | None, form: WeightFormat) -> Tensor:
    """Codes of values, as float32; shapes as they broadcast."""
    codes = values / scales.float()
    if zeros is not None:
        return (codes.round() + zeros).clamp(_LOWEST, _HIGHEST)
    codes = codes.clamp(-form.largest, form.largest)
    return codes.to(form.dtype).float() if form.dtype.is_floating_point else codes.round()
