"""Counts of kept rows, as every runner reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES


class KeptCounts(NamedTuple):
    """Kept rows of a call, as in `StepOutput`."""

    kept: np.ndarray | None
    kept_by_sequence: np.ndarray | None
    kept_by_token: np.ndarray | None


class KeptTable:
    """Arranges the kept rows of a stage, counted branch by branch, in a table over all layers.

    Args:
        manifest: of the bundle.
        layers: the layers that the stage runs.
    """

    def __init__(self, manifest: Manifest, layers: range) -> None:
        self.places = manifest.skippable_in(layers)
        self._is_dense = manifest.policy is None
        self._shape = (manifest.decoder.num_layers, len(BRANCHES))
        flat = [layer * len(BRANCHES) + BRANCHES.index(branch) for layer, branch in self.places]
        self._flat = np.array(flat, np.int64)

    def of(self, counts: Sequence[int] | np.ndarray | None) -> np.ndarray | None:
        """The table [L, 2] int64; None for a dense model.

        Args:
            counts: rows kept at each of `places`, in their order.
        """
        if counts is None or self._is_dense:
            return None
        kept = np.zeros(self._shape, np.int64)
        kept.put(self._flat, counts)
        return kept

    def of_each(self, kept: np.ndarray) -> np.ndarray:
        """The table of each sequence, [B, L, 2] int64; kept [places, B]: rows kept at each of `places`."""
        tables = np.zeros((kept.shape[1], self._shape[0] * self._shape[1]), np.int64)
        tables[:, self._flat] = kept.T
        return tables.reshape(-1, *self._shape)

    def counts(self, rows: np.ndarray) -> KeptCounts:
        """All that can be counted; rows [places, B, S] bool: whether each of `places` kept each token."""
        if self._is_dense:
            return KeptCounts(None, None, None)
        each = self.of_each(rows.sum(axis=2))
        return KeptCounts(each.sum(axis=0), each, rows.sum(axis=0))

    def rows(self, indices: Sequence[np.ndarray], batch: int, tokens: int) -> np.ndarray:
        """The kept rows as `counts` takes them; indices: for each of `places` the numbers of its rows, [K]."""
        rows = np.zeros((len(self.places), batch * tokens), np.bool_)
        for place, index in enumerate(indices):
            rows[place, index] = True
        return rows.reshape(-1, batch, tokens)
