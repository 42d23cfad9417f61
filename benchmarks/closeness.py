"""How far next-token distributions are from PyTorch's, for whatever gives logits, as `gsx verify` measures it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax

from gsx.parity.estimate import Estimate, mean_of, share_of
from gsx_exporter.evaluation import losses


@dataclass
class Closeness:
    """Accumulates windows of text."""

    _divergences: list[np.ndarray] = field(default_factory=list)
    _same: list[np.ndarray] = field(default_factory=list)
    _loss_changes: list[np.ndarray] = field(default_factory=list)

    def add(self, window: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> None:
        """Compare one window. Args: window: token ids [S]; wanted, found: logits [S, V]."""
        want, have = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (wanted, found))
        self._divergences.append((np.exp(want) * (want - have)).sum(axis=-1))
        self._same.append(want.argmax(axis=-1) == have.argmax(axis=-1))
        self._loss_changes.append(losses(found, window) - losses(wanted, window))

    @property
    def divergence(self) -> Estimate:
        """Mean KL divergence of the next-token distribution from PyTorch's, in nats."""
        return mean_of(self._divergences)

    @property
    def same(self) -> Estimate:
        """Share of tokens whose most likely next token is PyTorch's."""
        return share_of(self._same)

    @property
    def perplexity(self) -> Estimate:
        """Relative change of perplexity."""
        return mean_of(self._loss_changes).map(math.expm1)
