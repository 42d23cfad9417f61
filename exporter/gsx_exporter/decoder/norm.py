"""Norms of states: the root-mean-square norm, as one op that tracing does not take apart.

`torch.nn.functional.rms_norm` cannot be traced when the number of rows depends on the data (its implementation checks
whether there are any). So the call is wrapped in a custom op, which becomes ONNX's RMSNormalization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsx_exporter.config import ModelConfig


@torch.library.custom_op("gsx::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., W] divided by the root of its mean square, times weight [W]; computed in float32.

    PyTorch itself computes 16-bit types in float32 (in one kernel on a GPU) and rounds once. The weight is multiplied
    after that rounding, as in transformers and ONNX; passed to the function, it would be multiplied before.
    """
    return F.rms_norm(x, weight.shape, None, eps) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


class UnitNorm(nn.Module):
    """x divided by its norm over the last axis: a root-mean-square norm with a constant weight. It has no parameters.

    Computed in float32, and rounded once: the constant is no number of 16 bits.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps / width

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> the same shape."""
        weight = torch.full((self.width,), self.width**-0.5)
        return rms_norm(x.to(torch.float32), weight, self.eps).to(x.dtype)


def norm_of(config: ModelConfig, width: int, dtype: torch.dtype) -> RmsNorm | UnitNorm:
    """A norm as the model has them."""
    if config.sphere is not None:
        return UnitNorm(width, config.rms_norm_eps)
    return RmsNorm(width, config.rms_norm_eps, dtype)
