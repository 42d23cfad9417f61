"""How far to draft: always as far, or as far as it pays by measured acceptance and measured cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

# The most tokens that AdaptiveLength drafts at once, after its first rounds.
LONGEST = 16
# Until something is measured: drafts of this length, of tokens that are right this often.
FIRST_LENGTH, FIRST_ACCEPTANCE, PRIOR_TRIALS = 4, 0.7, 4.0
# What was measured n rounds ago counts DECAY ** n.
DECAY = 0.95
# Now and then a round of the other kind, plain or drafting, shows whether the choice is still right; at the beginning
# plain steps come in every other round, until so many were seen.
PROBE_EVERY, FIRST_PLAIN = 32, 3
# Guess for what another row costs in a verification, as a share of the first, until two sizes were measured.
ROW_COST = 0.05
# Tokens that a draft is tried on from each place, and so the longest draft that can be judged.
CHUNK = 8


@dataclass(frozen=True)
class Round:
    """What one round of drafting and verifying gave, over all sequences.

    Args:
        length: tokens drafted, of the sequence with the most.
        tokens: new tokens of a sequence, on average.
        accepted, rejected: drafted tokens that were right; sequences of which one was wrong.
        confidence: of the drafted tokens that were judged, summed up.
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
    """Decides how far each round drafts."""

    def next(self) -> int:
        """The most tokens to draft in the next round; 0 for a plain step."""
        ...

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """Whether a sequence drafts another token.

        Args:
            drafted: tokens that it has drafted in this round, 1 or more.
            confidence: the draft's own chance that all of them are right.
        """
        ...

    def learn(self, one: Round) -> None:
        """Take in a finished round."""
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
    """Drafts on as long as another token is likely to save more time than it takes.

    Another drafted token takes a draft step and a row of the verification. It saves the time that a token takes now, if
    it and all before it are right. The chance of those before is the draft's own confidence, corrected by how much of
    it came true so far; the chance of the next one is the measured acceptance. Verification is taken as linear in
    its rows. Where rounds with a draft give fewer tokens a second than plain steps, drafting is off.

    Args:
        first: length of the first rounds.
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
        if self._plain.weight < FIRST_PLAIN - 0.5:  # weights decay a little
            return 0 if self._rounds % 2 == 0 else LONGEST
        wins = self._token_seconds <= self._plain.mean
        probes = self._rounds % PROBE_EVERY == 0
        return LONGEST if wins != probes else 0

    def goes_on(self, drafted: int, confidence: float) -> bool:
        """See `DraftLength`."""
        if not self._draft.weight:
            return drafted < self.first
        # Each token's confidence is corrected, so the product of several of them by a power.
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
        """The measured chance that a drafted token is right, if the ones before it are."""
        return self._accepted / self._trials

    @property
    def _token_seconds(self) -> float:
        """What a token takes in rounds with a draft."""
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
        """Change of y with x; never below 0, nor so steep that y(0) is below 0: that is noise."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        guess = ROW_COST * mean_y / (1 + ROW_COST * (mean_x - 1))
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 0.05 else guess
        return min(max(slope, 0.0), mean_y / mean_x)


def counted_speed(accepted: np.ndarray, step_share: float) -> tuple[float, int]:
    """Speed over plain decoding at the best draft length, if time goes with the bytes that are read.

    Args:
        accepted: tokens in a row that the draft gets right at each place, [places] int64, 0 to CHUNK.
        step_share: bytes that a draft step reads, as a share of a plain step's.
    Returns: tokens in the time of a plain step; the draft length, 1 to CHUNK.
    """

    def speed(length: int) -> float:
        tokens = 1 + float(np.minimum(accepted, length).mean())
        return tokens / (length * step_share + 1 + ROW_COST * length)

    best = max(range(1, CHUNK + 1), key=speed)
    return speed(best), best
