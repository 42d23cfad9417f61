"""The interface between decoding loops and runtimes.

A runner executes one graph of a bundle. It owns the K/V memory, which a loop sees as a `Cache`: so many sequences,
so many columns filled. All arrays that cross the interface are NumPy arrays on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from engines.bundle.manifest import Manifest

Logits = Literal["last", "all"]


@dataclass
class Cache:
    """K/V of a batch of sequences.

    Args:
        batch: B, sequences.
        capacity: columns that fit.
        length: columns filled. A loop may lower it: what lies behind is then forgotten.
        memory: the runtime's own.
    """

    batch: int
    capacity: int
    length: int
    memory: Any


@dataclass(frozen=True)
class StepOutput:
    """What one call gives.

    Args:
        logits: [B, 1 or S, V] float32.
        kept: [L, 2] int64, rows kept by each (layer, branch) in this call; None for a model without gates.
    """

    logits: np.ndarray
    kept: np.ndarray | None


class Runner(Protocol):
    """Executes `model.onnx`, or an engine made of it."""

    manifest: Manifest

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Room for `batch` sequences of up to `capacity` columns, empty."""
        ...

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        select: np.ndarray | None,
        logits: Logits = "last",
    ) -> StepOutput:
        """Run S tokens of every sequence and append their K/V to the cache.

        Args:
            cache: its length grows by S.
            input_ids, position_ids: [B, S] int64.
            attention_mask: [B, length + S] int64: 1 for a token, 0 for padding.
            select: `thresholds` [L, 2] or `budget` [], float32; None for a model without gates.
            logits: of the last column or of all.
        """
        ...
