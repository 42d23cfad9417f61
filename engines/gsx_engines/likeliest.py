"""The likeliest tokens of a step, which an engine finds on the GPU, in place of the logits of all tokens.

An engine for steps gives the likeliest tokens with their logits, and a sum over all tokens, so that 1.5 KB a token
cross to the host in place of V numbers (`gsx_engines/lowering/for_tensorrt/likeliest.py`). All logits stay in the
engine's memory until its next call, for requests that need more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Likeliest:
    """What is known of one token's logits [V].

    Args:
        ids: [C] int64, the likeliest tokens, in ascending order of id. If the least likely of them has equals, it is
            open which of these are here.
        logits: [C] float32, theirs.
        total: the sum of exp(logit - largest) over all tokens; not finite if some logit is NaN or plus infinity.
        size: V.
        whole: fetches all logits [V] float32.
    """

    ids: np.ndarray
    logits: np.ndarray
    total: float
    size: int
    whole: Callable[[], np.ndarray]

    def has_all_of(self, logit: float) -> bool:
        """Whether all tokens with a logit of at least this are here."""
        return len(self.ids) == self.size or float(self.logits.min()) < logit


class LikelyLogits:
    """The likeliest tokens behind the tokens [B, O] of a call.

    Args:
        ids, logits: [B, O, C] int64 and float32, in any order.
        totals: [B, O] float32, as in `Likeliest`.
        size: V.
        fetch: gives the logits [V] float32 behind a token, by its place in [B, O]; until the engine's next call.
    """

    def __init__(
        self,
        ids: np.ndarray,
        logits: np.ndarray,
        totals: np.ndarray,
        size: int,
        fetch: Callable[[int, int], np.ndarray],
    ) -> None:
        self._ids, self._logits, self._totals, self._size, self._fetch = ids, logits, totals, size, fetch

    def of(self, row: int, token: int) -> Likeliest:
        """What is known of the logits behind one token of a sequence."""
        ids = self._ids[row, token]
        order = np.argsort(ids)
        return Likeliest(
            ids[order],
            self._logits[row, token][order],
            float(self._totals[row, token]),
            self._size,
            lambda: self._fetch(row, token),
        )

    def whole(self) -> np.ndarray:
        """All logits [B, O, V]."""
        batch, tokens = self._totals.shape
        rows = [self._fetch(row, token) for row in range(batch) for token in range(tokens)]
        return np.stack(rows).reshape(batch, tokens, self._size)


def all_of(logits: np.ndarray | Likeliest) -> np.ndarray:
    """All logits [V] behind a token."""
    return logits.whole() if isinstance(logits, Likeliest) else logits


# The logits of a call [B, O, V], or what is known of them.
Scores = np.ndarray | LikelyLogits


def whole_logits(scores: Scores) -> np.ndarray:
    """All logits [B, O, V] of a call, which must be the engine's latest."""
    return scores.whole() if isinstance(scores, LikelyLogits) else scores


def logits_behind(scores: Scores, row: int, token: int) -> np.ndarray | Likeliest:
    """What is known of the logits [V] behind one token of a call."""
    return scores.of(row, token) if isinstance(scores, LikelyLogits) else scores[row, token]
