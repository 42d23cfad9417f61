"""How many tokens to draft: a fixed number, or as many as pay off by measured acceptance and measured cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

# The most tokens that AdaptiveLength drafts at once, after its first rounds.
LONGEST = 16
# Before anything is measured: the length of drafts, and the assumed acceptance with the weight of so many trials.
FIRST_LENGTH, FIRST_ACCEPTANCE, PRIOR_TRIALS = 4, 0.7, 4.0
# A measurement from n rounds ago has the weight DECAY ** n.
DECAY = 0.95
# Every PROBE_EVERY rounds one round of the other kind, plain or drafting, checks whether the choice is still right. At
# the beginning every other round is a plain step, until FIRST_PLAIN of them were measured.
PROBE_EVERY, FIRST_PLAIN = 32, 3
# Assumed cost of one more row in a verification, as a share of the first row, until two sizes were measured.
ROW_COST = 0.05
# How many tokens a draft is tried on from each position, and so the longest draft that can be judged.
CHUNK = 8


@dataclass(frozen=True)
class Round:
    """The result of one round of drafting and verifying, over all sequences.

    Args:
        length: tokens drafted for the sequence with the most.
        tokens: new tokens per sequence, on average.
        accepted, rejected: drafted tokens that were correct, and sequences with a wrong one.
        confidence: sum of the draft's confidences in the tokens that were verified.
        draft_seconds, verify_seconds: time of the two parts.
    """

    length: int
    tokens: float
    accepted: int
    rejected: int
    confidence: float
    draft_seconds: float
    verify_seconds: float


class DraftLength(Protocol):
    """Decides how many tokens each round drafts."""

    def next(self) -> int:
        """The most tokens to draft in the next round; 0 for a plain step."""
        ...

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """Whether a sequence drafts another token.

        Args:
            drafted: how many it has drafted in this round, 1 or more.
            confidence: the draft's own probability that all of them are correct.
        """
        ...

    def learn(self, one: Round) -> None:
        """Take a finished round into account."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always the same draft length."""

    length: int

    def next(self) -> int:
        """See `DraftLength`."""
        return self.length

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """See `DraftLength`."""
        return True

    def learn(self, one: Round) -> None:
        """See `DraftLength`: nothing to learn."""


@dataclass
class AdaptiveLength:
    """Keeps drafting as long as another token is expected to save more time than it costs.

    Another drafted token costs a draft step and a row of the verification. It saves the time that a token takes now, if
    it and all before it are correct. The probability for those before it is the draft's own confidence, corrected by
    how well confidence has predicted acceptance so far; for the next one it is the measured acceptance. The cost of a
    verification is modelled as linear in its rows. While rounds with a draft give fewer tokens per second than plain
    steps, drafting is off.

    Args:
        first: draft length of the first rounds.
    """

    first: int = FIRST_LENGTH
    _draft: _Mean = field(default_factory=lambda: _Mean())
    _verify: _Line = field(default_factory=lambda: _Line())
    _seconds: _Mean = field(default_factory=lambda: _Mean())
    _tokens: _Mean = field(default_factory=lambda: _Mean())
    _accepted: float = FIRST_ACCEPTANCE * PRIOR_TRIALS
    _trials: float = PRIOR_TRIALS
    _confidence: float = FIRST_ACCEPTANCE * PRIOR_TRIALS
    _plain: _Mean = field(default_factory=lambda: _Mean())
    _rounds: int = 0

    def next(self) -> int:
        """See `DraftLength`."""
        self._rounds += 1
        if not self._draft.weight:
            return self.first
        if self._plain.weight < FIRST_PLAIN - 0.5:  # slightly less, since weights decay
            return 0 if self._rounds % 2 == 0 else LONGEST
        wins = self._token_seconds <= self._plain.mean
        probes = self._rounds % PROBE_EVERY == 0
        return LONGEST if wins != probes else 0

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """See `DraftLength`."""
        if not self._draft.weight:
            return drafted < self.first
        # Each token's confidence is corrected by one factor, so the product of several confidences by a power of it.
        chance = min(1.0, confidence * (self._accepted / max(self._confidence, 1e-9)) ** drafted)
        return chance * self.acceptance * self._token_seconds > self._draft.mean + self._verify.slope

    def learn(self, one: Round) -> None:
        """See `DraftLength`."""
        self._verify.add(one.length + 1, one.verify_seconds)
        if not one.length:
            self._plain.add(one.verify_seconds)
            return
        self._draft.add(one.draft_seconds / one.length)
        self._seconds.add(one.draft_seconds + one.verify_seconds)
        self._tokens.add(one.tokens)
        self._accepted = DECAY * self._accepted + one.accepted
        self._trials = DECAY * self._trials + one.accepted + one.rejected
        self._confidence = DECAY * self._confidence + one.confidence

    @property
    def acceptance(self) -> float:
        """The measured probability that a drafted token is correct, given that those before it are."""
        return self._accepted / self._trials

    @property
    def _token_seconds(self) -> float:
        """Seconds per token in rounds with a draft."""
        return self._seconds.total / self._tokens.total


@dataclass
class _Mean:
    weight: float = 0.0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.weight = DECAY * self.weight + 1
        self.total = DECAY * self.total + value

    @property
    def mean(self) -> float:
        return self.total / self.weight


@dataclass
class _Line:
    """Least squares of y over x with decaying weights."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = DECAY * self.weight + 1
        self.x = DECAY * self.x + x
        self.y = DECAY * self.y + y
        self.xx = DECAY * self.xx + x * x
        self.xy = DECAY * self.xy + x * y

    @property
    def slope(self) -> float:
        """Slope of the line, limited to what is plausible: not below 0, nor so steep that y(0) would be below 0."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        guess = ROW_COST * mean_y / (1 + ROW_COST * (mean_x - 1))
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 0.05 else guess
        return min(max(slope, 0.0), mean_y / mean_x)


def counted_speed(accepted: np.ndarray, step_share: float) -> tuple[float, int]:
    """Speed relative to plain decoding at the best draft length, if time is proportional to the bytes read.

    Args:
        accepted: how many tokens in a row the draft gets right from each position, [positions] int64, 0 to CHUNK.
        step_share: bytes that a draft step reads, as a share of those of a plain step.
    Returns: tokens in the time of a plain step; the draft length, 1 to CHUNK.
    """

    def speed(length: int) -> float:
        tokens = 1 + float(np.minimum(accepted, length).mean())
        return tokens / (length * step_share + 1 + ROW_COST * length)

    best = max(range(1, CHUNK + 1), key=speed)
    return speed(best), best
