"""How many tokens to draft: fixed, or found while generating from measured acceptance and measured cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

# The most tokens that are ever drafted at once.
LONGEST = 16
# Until something is measured: a draft of this length, of tokens that are right this often.
FIRST_LENGTH, FIRST_ACCEPTANCE, PRIOR_TRIALS = 4, 0.7, 4.0
# What was measured n rounds ago counts DECAY ** n.
DECAY = 0.95
# With drafting off, a short draft now and then shows whether that is still right.
PROBE_EVERY, PROBE_LENGTH = 32, 2
# Guess for what another row costs in a verification, as a share of the first, until two sizes were measured.
ROW_COST = 0.05


@dataclass(frozen=True)
class Round:
    """What one round of drafting and verifying gave.

    Args:
        length: tokens drafted, of the sequence with the most.
        accepted, rejected: drafted tokens that were right; sequences of which one was wrong.
        draft_seconds, verify_seconds: time of the two parts.
    """

    length: int
    accepted: int
    rejected: int
    draft_seconds: float
    verify_seconds: float


class DraftLength(Protocol):
    """Decides the draft length of each round."""

    def next(self) -> int:
        """Tokens to draft in the next round; 0 for a plain step."""
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

    def learn(self, one: Round) -> None:
        """See `DraftLength`: nothing to learn."""


@dataclass
class AdaptiveLength:
    """The length with the most tokens a second, by what the last rounds showed.

    With acceptance a, a draft of length d gives (1 - a^(d+1)) / (1 - a) tokens on average and takes d draft steps and
    a verification of d + 1 rows, whose time is taken as linear in the rows. Length 0 wins where drafting loses.

    Args:
        first: length of the first rounds.
    """

    first: int = FIRST_LENGTH
    _accepted: float = FIRST_ACCEPTANCE * PRIOR_TRIALS
    _trials: float = PRIOR_TRIALS
    _draft: _Mean = field(default_factory=lambda: _Mean())
    _verify: _Line = field(default_factory=lambda: _Line())
    _off: int = 0

    def next(self) -> int:
        """See `DraftLength`."""
        if self._draft.weight == 0 or self._verify.weight == 0:
            return self.first
        best = max(range(LONGEST + 1), key=self._speed)
        self._off = 0 if best else self._off + 1
        return PROBE_LENGTH if self._off and self._off % PROBE_EVERY == 0 else best

    def learn(self, one: Round) -> None:
        """See `DraftLength`."""
        self._verify.add(one.length + 1, one.verify_seconds)
        if one.length:
            self._draft.add(one.draft_seconds / one.length)
            self._accepted = DECAY * self._accepted + one.accepted
            self._trials = DECAY * self._trials + one.accepted + one.rejected

    @property
    def acceptance(self) -> float:
        """The measured chance that a drafted token is right, if the ones before it are."""
        return self._accepted / self._trials

    def _speed(self, length: int) -> float:
        a = min(self.acceptance, 0.999)
        tokens = (1 - a ** (length + 1)) / (1 - a)
        return tokens / (length * self._draft.mean + self._verify.at(length + 1))


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
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, DECAY * getattr(self, name) + value)

    def at(self, x: float) -> float:
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        guess = ROW_COST * mean_y / (1 + ROW_COST * (mean_x - 1))
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 0.05 else guess
        # A slope below 0, or a verification without a fixed cost, is noise.
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y + slope * (x - mean_x)
