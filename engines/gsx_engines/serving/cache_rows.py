"""The rows of the K/V cache that a server's requests share, and what ended requests left in the free ones.

A prompt that begins as another sequence did (a system prompt, a chat's history) need not be read again from its start:
K and V of the common tokens are copied, or already in the row. They are the same, since a token's decisions depend only
on its past and on the run-time values. Where the rule runs prompts in full, only tokens that both prompts ran in full
are the same; where tokens compete for a place (selection by rank), nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.generation.continuation import Continuation
from gsx_engines.runners.base import Runner

# Fewer common tokens are read again: a call for a few tokens takes as long as one for one.
LEAST_SHARED = 16


@dataclass
class _Held:
    """What a row holds. Args: used: when it was last in use, as a number that grows."""

    sequence: Continuation
    controls: RuntimeValues
    used: int


class CacheRows:
    """Running sequences, in the first rows, and free rows behind them.

    Args:
        runner: makes the cache, and copies rows.
        batch: number of rows.
        capacity: tokens of a row.
        shares: whether sequences may take over K and V from each other.
    """

    def __init__(self, runner: Runner, batch: int, capacity: int, *, shares: bool) -> None:
        self.cache = runner.new_cache(batch, capacity)
        self._runner, self._shares = runner, shares
        self._held: list[_Held | None] = [None] * batch
        self._now = 0

    def enter(self, row: int, sequence: Continuation, controls: RuntimeValues, *, afresh: bool = False) -> int:
        """Let a sequence begin in the first free row; what the row holds goes to the free row that is unused longest.

        Args: afresh: whether the whole prompt must be read.
        Returns: how many tokens of its prompt the row already holds, fewer than all.
        """
        lengths = [0 if afresh else self._common(at, sequence, controls) for at in range(len(self._held))]
        source = int(np.argmax(lengths))
        shared = lengths[source] if lengths[source] >= LEAST_SHARED else 0
        if not shared or source != row:
            self._save(row, row + 1, spared=source if shared else None)
            self._forget(row)
            if shared:
                self._runner.copy(self.cache, source, row, shared)
        self._cut(row, shared)
        self._now += 1
        self._held[row] = _Held(sequence, controls, self._now)
        return shared

    def copy(self, source: int, row: int, length: int) -> None:
        """Copy the first tokens of a running sequence to the row of another one."""
        self._runner.copy(self.cache, source, row, length)

    def leave(self, row: int, last: int, *, failed: bool = False) -> None:
        """End a sequence: the last running one moves into its row. What it leaves is kept while no other needs a row.

        Args: failed: whether its K and V may be incomplete.
        """
        held = self._held[row]
        self._now += 1
        if failed or held is None:
            self._forget(row)
        else:
            held.used = self._now
        if row != last:
            self._save(row, last + 1)
            self._runner.copy(self.cache, last, row, self.cache.lengths[last])
            self._held[row] = self._held[last]
            self._forget(last)

    def _common(self, row: int, sequence: Continuation, controls: RuntimeValues) -> int:
        """How many of a prompt's first tokens are in a row; not its last one, whose logits are needed."""
        held = self._held[row]
        if held is None or not self._shares:
            return 0
        of_prompt = "full_until"
        others = (held.controls.keys() | controls.keys()) - {of_prompt}
        if any(not np.array_equal(held.controls[name], controls[name]) for name in others):
            return 0
        # The new tokens of a held budget had other thresholds.
        written = held.sequence.tokens if held.sequence.hold is None else ()
        there = [*held.sequence.prompt, *written][: self.cache.lengths[row]]
        common = _common_start(there, sequence.prompt[:-1])
        if of_prompt in controls:
            until = {int(held.controls[of_prompt][0]), int(controls[of_prompt][0])}
            common = common if len(until) == 1 else min(common, *until)
        return common

    def _save(self, row: int, first: int, spared: int | None = None) -> None:
        """Copy what a row holds to the free row that is unused longest, from row `first` on, if it is older."""
        held = self._held[row]
        free = [at for at in range(first, len(self._held)) if at != spared]
        if held is None or not free or self.cache.lengths[row] < LEAST_SHARED:
            return
        target = min(free, key=self._used)
        if self._used(target) < held.used:
            self._forget(target)
            self._runner.copy(self.cache, row, target, self.cache.lengths[row])
            self._held[target] = held

    def _used(self, row: int) -> int:
        held = self._held[row]
        return 0 if held is None else held.used

    def _forget(self, row: int) -> None:
        self._held[row] = None
        self._cut(row, 0)

    def _cut(self, row: int, length: int) -> None:
        lengths = list(self.cache.lengths)
        lengths[row] = length
        self.cache.roll_back(lengths)


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common before the first difference."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:size]) != np.asarray(other[:size]))
    return int(differ[0]) if len(differ) else size
