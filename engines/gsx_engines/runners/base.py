"""The interface between decoding loops and runtimes.

A `Stage` is one graph of a bundle on one runtime: all layers, or the ones below or above an exit. A `Runner` makes
whole steps out of one stage, or of two with the exit between them (`split.py`). Decoding loops see only runners and
the `Cache`. All arrays that cross the interface are NumPy arrays on the host.

The sequences of a batch may differ in length: a call takes up to S tokens of each (`counts`), and the cache is rolled
back for each sequence separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.likeliest import Likeliest, Scores, logits_behind, whole_logits

Logits = Literal["none", "last", "all"]


@dataclass
class Cache:
    """K/V of a batch of sequences.

    Args:
        batch: B, the number of sequences.
        capacity: tokens that fit, for each sequence.
        lengths: tokens that the cache holds, for each sequence.
        verified: how many of them have been through all layers; fewer than `lengths` while drafted tokens of a split
            runner wait for verification.
        memory: private to the runner.
    """

    batch: int
    capacity: int
    lengths: list[int]
    verified: list[int]
    memory: Any

    def copy(self, source: int, target: int, length: int) -> None:
        """Record that the first tokens of a sequence are now in another row too."""
        for name in ("lengths", "verified"):
            numbers = list(getattr(self, name))
            numbers[target] = min(numbers[source], length)
            setattr(self, name, numbers)

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Forget all tokens beyond these lengths, one length for each sequence."""
        self.lengths = list(map(min, self.lengths, lengths))
        self.verified = list(map(min, self.verified, lengths))


@dataclass(frozen=True)
class StepOutput:
    """The result of one call.

    Args:
        scores: the logits, float32; "last": [B, 1, V], for each sequence's last token in the call; "all": [B, S, V],
            meaningless beyond a sequence's count; "none": [B, 0, V]. Or the likeliest, of an engine that gives those.
        kept: [L, 2] int64, rows kept by each (layer, branch) in this call; None for a dense model.
        gated_rows: rows that the keep rule decided on in this call: one for each token and skippable branch.
        kept_by_sequence: [B, L, 2] int64, kept rows of each sequence; None for a dense model, and where
            the runtime reports only the sum.
        kept_by_token: [B, S] int64, how many branches kept each token, 0 beyond a sequence's count; None for a dense
            model, and where the runtime does not tell (`Stage.counts_tokens`).
    """

    scores: Scores
    kept: np.ndarray | None
    gated_rows: int = 0
    kept_by_sequence: np.ndarray | None = None
    kept_by_token: np.ndarray | None = None

    @property
    def logits(self) -> np.ndarray:
        """All logits, while this is the runner's latest call."""
        return whole_logits(self.scores)

    def behind(self, row: int, token: int) -> np.ndarray | Likeliest:
        """What is known of the logits [V] behind one token, while this is the runner's latest call."""
        return logits_behind(self.scores, row, token)


@dataclass(frozen=True)
class Call:
    """The tokens of one call. Counts are lists: with so few numbers a NumPy call costs more than the work itself.

    Args:
        ids: [B, S] int64; arbitrary beyond a sequence's count.
        counts: tokens of each sequence, up to S.
        lengths: tokens of each sequence in the cache before this call.
        controls: run-time values of the keep rule.
    """

    ids: np.ndarray
    counts: list[int]
    lengths: list[int]
    controls: RuntimeValues


# What leaves an exit layer and enters the next one, for the tokens of one call, by the graphs' names
# (`Manifest.exit_state`). The last axis but one is the tokens.
ExitState = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StageOutput:
    """The result of a stage: scores and kept rows as in `StepOutput`, and the exit state if it ends at an exit."""

    scores: Scores
    state: ExitState | None
    kept: np.ndarray | None
    kept_by_sequence: np.ndarray | None = None
    kept_by_token: np.ndarray | None = None

    @property
    def logits(self) -> np.ndarray:
        """All logits, while this is the stage's latest call."""
        return whole_logits(self.scores)


class Stage(Protocol):
    """One graph of a bundle on one runtime.

    Attributes:
        manifest: of the bundle.
        layers: the layers that it runs.
        counts_tokens: whether it tells how many branches kept each token.
    """

    manifest: Manifest
    layers: range
    counts_tokens: bool

    def new_memory(self, batch: int, capacity: int) -> Any:
        """Memory for the K/V of these layers."""
        ...

    def run(self, memory: Any, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """Run a call's tokens and append their K/V at `call.lengths`; state: the exit state, for a second stage."""
        ...

    def copy(self, memory: Any, source: int, target: int, length: int) -> None:
        """Copy the K/V of a sequence's first `length` tokens to another row, whose own K/V are lost."""
        ...


class Runner(Protocol):
    """Makes whole steps: every layer either runs on a token or is skipped by the keep rule.

    Attributes:
        manifest: of the bundle.
        counts_tokens: whether its outputs tell how many branches kept each token.
    """

    manifest: Manifest
    counts_tokens: bool

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""
        ...

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        controls: RuntimeValues,
        *,
        counts: list[int] | None = None,
        logits: Logits = "last",
    ) -> StepOutput:
        """Run tokens of every sequence and append their K/V to the cache.

        Args:
            cache: its lengths grow by `counts`.
            input_ids: [B, S] int64.
            controls: as in `Call`; until the cache is rolled back to nothing only thresholds may change.
            counts: tokens of each sequence; None for S tokens of every sequence.
            logits: of each sequence's last token, of all tokens, or none.
        """
        ...

    def copy(self, cache: Cache, source: int, target: int, length: int) -> None:
        """Copy a sequence's first `length` tokens to another row, whose own sequence is lost."""
        ...


def new_cache(batch: int, capacity: int, memory: Any) -> Cache:
    """An empty cache."""
    return Cache(batch, capacity, [0] * batch, [0] * batch, memory)


def call_of(cache: Cache, input_ids: np.ndarray, counts: list[int] | None, controls: RuntimeValues) -> Call:
    """The call that appends tokens to a cache.

    Raises:
        ValueError: the tokens do not fit.
    """
    if counts is None:
        counts = [input_ids.shape[1]] * cache.batch
    needed = max(grown(cache.lengths, counts))
    if needed > cache.capacity:
        raise ValueError(f"the cache holds {cache.capacity} tokens, {needed} are needed")
    return Call(input_ids, counts, cache.lengths, controls)


def grown(lengths: list[int], counts: list[int]) -> list[int]:
    """Lengths after a call."""
    return list(map(int.__add__, lengths, counts))


def step_output(stage: Stage, call: Call, output: StageOutput) -> StepOutput:
    """A stage's output as a decoding loop sees it."""
    gated_rows = sum(call.counts) * len(stage.manifest.skippable_in(stage.layers))
    return StepOutput(output.scores, output.kept, gated_rows, output.kept_by_sequence, output.kept_by_token)
