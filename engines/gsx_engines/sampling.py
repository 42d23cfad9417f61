"""Choosing the next token from logits: greedy, or sampled after temperature, top-k and top-p.

A sampled token is the winner of an exponential race (the Gumbel-max trick): token v of probability p_v arrives at the
time -log(u_v) / p_v, and the first one is taken. The noise u depends on the seed, the place in the text and the token
alone, so the same seed gives the same text however it is computed: alone or in a batch, and with any draft. A draft
that picks with the same noise is then right wherever its distribution is near the model's, and the model's own pick
decides (drafter-invariant speculative decoding, arXiv:2408.07978).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gsx_engines.errors import EngineError
from gsx_plugins.errors import UsageError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        seed: of the random numbers; None for a fresh one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError("temperature", expected="a number of at least 0", found=str(self.temperature))
        if self.top_k < 0:
            raise UsageError("top-k", expected="0 (all) or more", found=str(self.top_k))
        if not 0 < self.top_p <= 1:
            raise UsageError("top-p", expected="a number above 0 and at most 1", found=str(self.top_p))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


GREEDY = Sampling()


class Picker:
    """Picks tokens of the sequences of one generation.

    Args:
        sampling: how; without a seed, the operating system gives one.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        seed = sampling.seed
        self._seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if seed is None else seed

    def pick(self, logits: np.ndarray, sequence: int, place: int) -> int:
        """The token at a place of a sequence.

        Args:
            logits: [V].
            sequence: its number in the batch.
            place: the new token's position in the text, prompt included.
        Raises:
            EngineError: logits that no token can be chosen by: NaN, or the largest is infinite.
        """
        if self._sampling.greedy:
            best = int(logits.argmax())  # of the first NaN, where there is one
            _check_largest(float(logits[best]))
            return best
        ids, weights = candidates(logits, self._sampling)
        return int(ids[np.argmin(-np.log(noise(self._key(sequence, place), ids)) / weights)])

    def scores(self, logits: np.ndarray, sequence: int, place: int) -> np.ndarray:
        """What `pick` takes the largest of, [V] in units of logits: two tokens this near may change places by rounding.

        Sampled, top-k and top-p left aside: the logits with the race's noise.
        """
        if self._sampling.greedy:
            return logits.astype(np.float64)
        arrival = -np.log(noise(self._key(sequence, place), np.arange(len(logits))))
        return logits - self._sampling.temperature * np.log(arrival)

    def _key(self, sequence: int, place: int) -> int:
        return _mix(_mix(_mix(self._seed & _MASK) + sequence) + place)

    def confidence(self, logits: np.ndarray) -> float:
        """A draft's own chance that the model picks the same token; logits [V] of the draft.

        Greedy: the probability of its choice. Sampled: 1, since two equal distributions always pick alike, so how
        likely the token was says nothing; what the draft is worth is then known from acceptance alone.
        """
        if not self._sampling.greedy:
            return 1.0
        return float(1.0 / np.exp(logits - logits.max()).sum())


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] int64 of the tokens that may come next, and their probabilities [n] float64; logits [V].

    Temperature comes first, then top-k, then top-p, which keeps the shortest run of tokens, likeliest first, whose
    probabilities reach it. Of equal tokens the earlier one counts as the likelier.

    Raises:
        EngineError: as `Picker.pick`.
    """
    largest = float(logits.max())  # NaN, where there is one
    _check_largest(largest)
    with np.errstate(over="ignore"):  # at a temperature of next to nothing all but the best are minus infinity
        scaled = (logits.astype(np.float64) - largest) / sampling.temperature
    ids = np.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        least = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scaled >= least)
    if sampling.top_k or sampling.top_p < 1:
        ids = ids[np.argsort(-scaled[ids], kind="stable")]
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    weights = np.exp(scaled[ids] - scaled[ids].max())
    weights /= weights.sum()
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        ids, weights = ids[:count], weights[:count] / weights[:count].sum()
    likely = weights > 0  # what underflowed can never win
    return ids[likely], weights[likely]


def _check_largest(logit: float) -> None:
    """Refuse logits by their largest one."""
    if not math.isfinite(logit):
        raise EngineError(
            "the model gave logits that no token can be chosen by",
            expected="numbers, of which the largest is finite",
            found="NaN" if math.isnan(logit) else "an infinite one, or none",
            todo="gsx verify compares the bundle with PyTorch; fp16 may be too narrow for this model",
        )


def noise(key: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), one for each token id [n]: SplitMix64 of key + id x golden ratio, upper 53 bits."""
    z = np.uint64(key) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(value: int) -> int:
    """SplitMix64 of a whole number."""
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
