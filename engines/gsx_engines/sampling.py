"""Choosing the next token from logits: greedy, or sampled after temperature, top-k, top-p and min-p.

A sampled token is the winner of an exponential race (the Gumbel-max trick): token v of probability p_v arrives at time
-log(u_v) / p_v, and the first one to arrive is chosen. The noise u depends only on the seed, the sequence, the position
in the text and the token, so the same seed gives the same text however it is computed: alone or in a batch, with or
without a draft. A draft that picks with the same noise is usually right where its distribution is close to the
model's, and the model's own pick decides (drafter-invariant speculative decoding, arXiv:2408.07978).

Biases and penalties change the logits before that (`adjusted`). They depend on nothing but the text so far, so all this
still holds: the model's pick behind a drafted token is made with that token in the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gsx_engines.errors import EngineError
from gsx_engines.likeliest import Likeliest
from gsx_plugins.errors import UsageError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# The ranges of the OpenAI API.
MOST_BIAS, MOST_PENALTY, MOST_LOGPROBS = 100.0, 2.0, 20
# Logits times or over this stay float32 numbers.
MOST_REPETITION = 100.0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability.
        seed: of the random numbers; None for a new one each time.
        min_p: only tokens at least this share as likely as the likeliest one; 0 for all.
        repetition_penalty: divides the logits above 0 of tokens in the prompt and the new text, and multiplies those
            below; 1 for none.
        frequency_penalty: taken off a token's logit for each time that it is in the new text.
        presence_penalty: taken off a token's logit if it is in the new text.
        logit_bias: added to the logits of tokens, by id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(
                "the temperature is out of range", expected="a number of at least 0", found=str(self.temperature)
            )
        if self.top_k < 0:
            raise UsageError("top-k is out of range", expected="0 (all) or more", found=str(self.top_k))
        if not 0 < self.top_p <= 1:
            raise UsageError("top-p is out of range", expected="a number above 0 and at most 1", found=str(self.top_p))
        if not 0 <= self.min_p <= 1:
            raise UsageError("min-p is out of range", expected="a number from 0 to 1", found=str(self.min_p))
        if not 1 / MOST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise UsageError(
                "the repetition penalty is out of range",
                expected=f"a number from {1 / MOST_REPETITION:g} to {MOST_REPETITION:g}; 1 for none",
                found=str(self.repetition_penalty),
            )
        for name, penalty in (("frequency", self.frequency_penalty), ("presence", self.presence_penalty)):
            if not abs(penalty) <= MOST_PENALTY:
                raise UsageError(
                    f"the {name} penalty is out of range",
                    expected=f"a number from -{MOST_PENALTY:g} to {MOST_PENALTY:g}",
                    found=str(penalty),
                )
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MOST_BIAS:
                raise UsageError(
                    f"the bias of token {token} is out of range",
                    expected=f"a number from -{MOST_BIAS:g} to {MOST_BIAS:g}",
                    found=str(bias),
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether biases or penalties change the logits."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalties or bool(self.logit_bias)

    def check_ids(self, vocabulary: int) -> None:
        """Refuse biases of tokens that a model does not have."""
        for token in self.logit_bias:
            if not 0 <= token < vocabulary:
                raise UsageError(
                    "a bias is for a token outside the vocabulary", expected=f"0 to {vocabulary - 1}", found=str(token)
                )


GREEDY = Sampling()
# How many tokens top-p sorts at first: they nearly always reach its bound.
_FIRST_SORTED = 512
# An upper bound of the relative rounding of a few operations in float64.
_ROUNDING = 1e-12


class Picker:
    """Picks tokens of the sequences of one generation.

    Args:
        sampling: how tokens are chosen; without a seed, the operating system provides one.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        seed = sampling.seed
        self._seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) if seed is None else seed

    def pick(self, logits: np.ndarray | Likeliest, sequence: int, place: int) -> int:
        """Choose a token of a sequence.

        Args:
            logits: [V], `adjusted`; or the likeliest ones, from which the same token is chosen: where they do not
                suffice, all logits are fetched.
            sequence: its number in the batch.
            place: the new token's position in the text, prompt included.
        Raises:
            EngineError: no token can be chosen: some logit is NaN, or the largest is infinite.
        """
        if isinstance(logits, Likeliest):
            if not suffices(logits, self.sampling):
                return self.pick(logits.whole(), sequence, place)
            return self._pick(logits.logits, logits.ids, sequence, place)
        return self._pick(logits, None, sequence, place)

    def _pick(self, logits: np.ndarray, names: np.ndarray | None, sequence: int, place: int) -> int:
        """As `pick`, from the logits [n] of some tokens. Args: names: their ids, ascending; None: of all tokens."""
        if self.sampling.greedy:
            best = int(logits.argmax())  # the first NaN, if there is one
            _check_largest(float(logits[best]))
        else:
            ids, weights = candidates(logits, self.sampling)
            uniform = noise(self._key(sequence, place), ids if names is None else names[ids])
            best = int(ids[np.argmin(-np.log(uniform) / weights)])
        return best if names is None else int(names[best])

    def scores(self, logits: np.ndarray, sequence: int, place: int) -> np.ndarray:
        """The scores of which `pick` chooses the largest, [V] in units of logits, to see how close two tokens are.

        With sampling these are the logits with the noise of the race; top-k and top-p are ignored.
        """
        if self.sampling.greedy:
            return logits.astype(np.float64)
        arrival = -np.log(noise(self._key(sequence, place), np.arange(len(logits))))
        return logits - self.sampling.temperature * np.log(arrival)

    def _key(self, sequence: int, place: int) -> int:
        return _mix(_mix(_mix(self._seed & _MASK) + sequence) + place)

    def confidence(self, logits: np.ndarray | Likeliest) -> float:
        """The draft's own probability that the model picks the same token; logits [V] of the draft.

        Greedy: the probability of the draft's choice. Sampled: 1, since with the same noise two equal distributions
        always pick the same token, so the probability of the token says nothing. Then only acceptance shows how good
        the draft is.
        """
        if not self.sampling.greedy:
            return 1.0
        if isinstance(logits, Likeliest):
            return 1.0 / logits.total
        return float(1.0 / np.exp(logits - logits.max()).sum())


def adjusted(logits: np.ndarray, sampling: Sampling, prompt: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Logits [V] after biases and penalties: each is computed in float64 and rounded once.

    Args: logits [V]; prompt, new: the text so far, as ids.
    Rule: bias and repetition as transformers' `SequenceBiasLogitsProcessor` and `RepetitionPenaltyLogitsProcessor`, in
    this order; then frequency and presence, as the OpenAI API defines them for new tokens.
    """
    values = logits.astype(np.float64)
    for token, bias in sampling.logit_bias.items():
        values[token] += bias
    if sampling.repetition_penalty != 1:
        ids = np.unique(np.array([*prompt, *new]))
        one, penalty = values[ids], sampling.repetition_penalty
        values[ids] = np.where(one < 0, one * penalty, one / penalty)
    if new:
        ids, counts = np.unique(np.array(new), return_counts=True)
        values[ids] -= sampling.frequency_penalty * counts
        values[ids] -= sampling.presence_penalty
    return values.astype(logits.dtype)


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model thought a token, and the tokens that it thought likeliest: natural logarithms.

    These are the model's own probabilities, before biases, penalties, temperature and cuts.

    Args:
        logprob: of the chosen token.
        top: ids and logarithms of the likeliest tokens, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the `count` likeliest; of equal ones the earlier comes first. logits [V]."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    ids = (
        np.flatnonzero(scores >= np.partition(scores, -count)[-count])
        if 0 < count < len(scores)
        else np.arange(len(scores))
    )
    best = ids[np.argsort(-scores[ids], kind="stable")][:count]
    return TokenLogprobs(float(scores[token]), tuple((int(one), float(scores[one])) for one in best))


def check_logprobs(count: int | None) -> None:
    """Refuse a number of likeliest tokens that nobody can want."""
    if count is not None and not 0 <= count <= MOST_LOGPROBS:
        raise UsageError(
            "the number of log-probabilities is out of range", expected=f"0 to {MOST_LOGPROBS}", found=str(count)
        )


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] int64 of the tokens that may come next, and their probabilities [n] float64; logits [V].

    Temperature is applied first, then top-k, then top-p, which keeps the smallest number of likeliest tokens whose
    probabilities sum up to it, then min-p. Of equally likely tokens the earlier one comes first.

    Raises:
        EngineError: as `Picker.pick`.
    """
    largest = float(logits.max())  # NaN, if there is one
    _check_largest(largest)
    with np.errstate(over="ignore"):  # at a temperature close to 0 all but the best become minus infinity
        scaled = (logits.astype(np.float64) - largest) / sampling.temperature
    ids = np.arange(len(scaled))
    if sampling.top_k:
        ids = _best(scaled, sampling.top_k)
    weights = np.exp(scaled[ids])  # that of the likeliest is 1
    if sampling.top_p < 1:
        bound = sampling.top_p * float(weights.sum())
        count = 0
        while count < len(ids):  # a few tokens nearly always reach the bound: sorting all takes ten times as long
            count = min(len(ids), max(16 * count, _FIRST_SORTED))
            best = _best(scaled[ids], count)
            reached = int(np.searchsorted(np.cumsum(weights[best]), bound)) + 1
            if reached <= count:
                break
        ids, weights = ids[best[:reached]], weights[best[:reached]]
    if sampling.min_p > 0:
        kept = weights >= sampling.min_p
        ids, weights = ids[kept], weights[kept]
    likely = weights > 0  # a weight that underflowed can never win
    ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


def suffices(likeliest: Likeliest, sampling: Sampling) -> bool:
    """Whether the likeliest tokens alone give what all logits would: the same candidates, with the same weights.

    With top-p alone, or without any cut, the choice is among all tokens.
    """
    if not math.isfinite(likeliest.total):
        return False  # so that the message says what is wrong with the logits
    order = np.sort(likeliest.logits)[::-1]
    if sampling.greedy:
        return likeliest.has_all_of(float(order[0]))
    if 0 < sampling.top_k < likeliest.size:
        return sampling.top_k <= len(order) and likeliest.has_all_of(float(order[sampling.top_k - 1]))
    if sampling.min_p > 0 and sampling.top_p == 1:
        below = (float(order[-1]) - float(order[0])) / sampling.temperature
        return len(order) == likeliest.size or math.exp(below) < sampling.min_p * (1 - _ROUNDING)
    return len(order) == likeliest.size


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, the largest first; of equal ones the earlier comes first."""
    places = np.arange(len(values))
    if count < len(values):
        places = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return places[np.argsort(-values[places], kind="stable")][:count]


def _check_largest(logit: float) -> None:
    """Refuse logits whose largest one is not a finite number."""
    if not math.isfinite(logit):
        raise EngineError(
            "no token can be chosen from the model's logits",
            expected="numbers with a finite maximum",
            found="NaN" if math.isnan(logit) else "an infinite maximum",
            todo="gsx verify compares the bundle with PyTorch; the range of fp16 may be too small for this model",
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
