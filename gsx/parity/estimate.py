"""A mean over the tokens of a text, how far chance may have moved it, and whether that is enough to judge a limit.

A text is a sample: another text of the same kind would give another mean. The interval says by how much, and where it
is wide and reaches over a limit, the mean has not shown that the limit holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # and not `stats`, which takes seconds and 40 MB to import

# Of many texts, this share has the true mean within the interval.
CONFIDENCE = 0.95
# Tokens of one window go wrong together: on SmolLM2 with K and V in 8 bits, one window of eight has three times the
# divergence of the others, all along. So a sample is a block of neighbours: a window, or a part of one as long as gives
# this many blocks, but no shorter than BLOCK_TOKENS.
BLOCKS, BLOCK_TOKENS = 16, 32
# More tokens than this cannot be asked for: the limit is too small for any text.
_MOST_NEEDED = 10_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Args:
        value: the mean; low, high: ends of its 95 % confidence interval.
        tokens: how many it was taken over.
    """

    value: float
    low: float
    high: float
    tokens: int

    def map(self, change: Callable[[float], float]) -> Estimate:
        """The same in another unit. Args: change: a function that grows with its argument."""
        return Estimate(change(self.value), change(self.low), change(self.high), self.tokens)

    def decides(self, limit: float) -> bool:
        """Whether a value within this limit (on either side of 0) shows that the limit holds: the whole interval is
        within it, or narrower than the limit itself. Without the second, no text would be long enough for a value near
        the limit; with it, what is over the limit by half or more still shows."""
        return self._reach <= limit or self.high - self.low <= limit

    def tokens_needed(self, limit: float) -> int | None:
        """About how many tokens would decide: the width falls with the square root of the number of tokens. None if no
        text of a reasonable length would."""
        room = limit - abs(self.value)
        width = self.high - self.low
        if limit <= 0 or not math.isfinite(width):
            return None
        shorter = [width / limit]
        if room > 0:
            shorter.append((self._reach - abs(self.value)) / room)
        needed = self.tokens * min(shorter) ** 2
        return math.ceil(needed) if needed <= _MOST_NEEDED else None

    @property
    def nearest(self) -> float:
        """How near to 0 the interval comes; NaN if the mean is not a number."""
        return abs(self.value) if math.isnan(self.value) else max(0.0, self.low, -self.high)

    @property
    def _reach(self) -> float:
        """How far from 0 the interval reaches."""
        return max(abs(self.low), abs(self.high))


def mean_of(windows: Sequence[np.ndarray]) -> Estimate:
    """The mean over tokens, from one array [S] of values for each window of text.

    Its interval is Student's, over blocks of neighbouring tokens. With one block it is infinite.
    """
    parts = math.ceil(BLOCKS / len(windows))
    blocks = [
        part for window in windows for part in np.array_split(window, max(1, min(parts, len(window) // BLOCK_TOKENS)))
    ]
    sizes = np.array([len(part) for part in blocks], np.float64)
    means = np.array([part.mean() for part in blocks])
    tokens = int(sizes.sum())
    value = float((means * sizes).sum() / tokens)
    count = len(blocks)
    if count < 2 or not math.isfinite(value):
        return Estimate(value, -math.inf, math.inf, tokens)
    # Blocks are nearly equal: each weighs as much as it has tokens.
    error = math.sqrt(float(((sizes * (means - value)) ** 2).sum()) * count / (count - 1)) / tokens
    width = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Estimate(value, value - width, value + width, tokens)


def share_of(windows: Sequence[np.ndarray]) -> Estimate:
    """The share of tokens for which something holds, from one array [S] of booleans for each window.

    Its interval is the wider of the blocks' and Wilson's for independent tokens, which is not empty where the share is
    0 or 1: that nothing was seen in 100 tokens does not mean that it happens nowhere.
    """
    found = mean_of([window.astype(np.float64) for window in windows])
    z = float(special.ndtri((1 + CONFIDENCE) / 2))
    n, p = found.tokens, found.value
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    width = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    low, high = min(found.low, centre - width), max(found.high, centre + width)
    return Estimate(p, max(0.0, low), min(1.0, high), n)
