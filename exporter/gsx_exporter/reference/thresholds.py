"""The thresholds that reference rules read: one table for all sequences, or one for each."""

from __future__ import annotations

import numpy as np
import torch

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_plugins.errors import UsageError


def check_thresholds(found: np.ndarray) -> None:
    """Check thresholds.

    Raises:
        UsageError: not [L, 2] or [B, L, 2] float32, or a value is NaN.
    """
    if found.ndim not in (2, 3) or found.shape[-1] != 2 or found.dtype != np.float32:
        raise UsageError(
            "thresholds: wrong shape or type",
            expected="[L, 2] or [B, L, 2] float32",
            found=f"{found.shape} {found.dtype}",
        )
    if np.isnan(found).any():
        raise UsageError("thresholds: contain NaN", expected="numbers, or -inf to keep every token")


def thresholds_at(thresholds: np.ndarray, layer: int, branch: Branch) -> torch.Tensor:
    """The threshold of each sequence at a branch, [B or 1, 1] float64. Args: thresholds: [L, 2] or [B, L, 2]."""
    return torch.from_numpy(thresholds[..., layer, BRANCHES.index(branch)].reshape(-1, 1)).double()
