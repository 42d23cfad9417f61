"""Checking the thresholds that reference rules read."""

from __future__ import annotations

import numpy as np

from gsx_plugins.errors import UsageError


def check_thresholds(found: np.ndarray) -> None:
    """Check thresholds.

    Raises:
        UsageError: not [L, 2] float32, or a value is NaN.
    """
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype != np.float32:
        raise UsageError(
            "thresholds: wrong shape or type",
            expected="[L, 2] float32",
            found=f"{found.shape} {found.dtype}",
        )
    if np.isnan(found).any():
        raise UsageError("thresholds: contain NaN", expected="numbers, or -inf to keep every token")
