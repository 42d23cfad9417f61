"""The interface between decoding loops and runtimes.

A `Stage` is one graph of a bundle on one runtime: all layers, or the ones below or above an exit. A `Runner` makes
whole steps of stages: one stage, or two with the exit between them (`split.py`). Loops see runners and the `Cache`
alone. All arrays that cross the interface are NumPy arrays on the host.

Sequences of a batch have lengths of their own: a call takes up to S tokens of each, counted in `counts`, and a cache
is shortened sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from gsx_engines.bundle.controls import Controls
from gsx_engines.bundle.manifest import Manifest

Logits = Literal["none", "last", "all"]


@dataclass
class Cache:
    """K/V of a batch of sequences.

    Args:
        batch: B, sequences.
        capacity: tokens of each that fit.
        lengths: tokens of each sequence that the cache holds.
        verified: those that have been through all layers; fewer than `lengths` between a draft of a split runner and
            its verification.
        memory: the runner's own.
    """

    batch: int
    capacity: int
    lengths: list[int]
    verified: list[int]
    memory: Any

    def move(self, source: int, target: int) -> None:
        """The lengths of a sequence that moves to another row; its own row is then empty."""
        for name in ("lengths", "verified"):
            numbers = list(getattr(self, name))
            numbers[target], numbers[source] = numbers[source], 0
            setattr(self, name, numbers)

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Forget what lies behind these lengths, one a sequence."""
        self.lengths = list(map(min, self.lengths, lengths))
        self.verified = list(map(min, self.verified, lengths))


@dataclass(frozen=True)
class StepOutput:
    """What one call gives.

    Args:
        logits: float32; "last": [B, 1, V], of each sequence's last token in the call; "all": [B, S, V], of no
            meaning behind a sequence's count; "none": [B, 0, V].
        kept: [L, 2] int64, rows kept by each (layer, branch) in this call; None for a dense model.
        gated_rows: rows that the keep rule judged in this call, one a token and skippable branch.
        kept_by_sequence: [B] int64, the kept rows of each sequence in all branches; None for a dense model, and where
            the runtime tells the sum alone.
    """

    logits: np.ndarray
    kept: np.ndarray | None
    gated_rows: int = 0
    kept_by_sequence: np.ndarray | None = None


@dataclass(frozen=True)
class Call:
    """The tokens of one call. Counts are lists: for a few numbers a NumPy call costs more than the work.

    Args:
        ids: [B, S] int64; behind a sequence's count, whatever.
        counts: tokens of each sequence, up to S.
        lengths: tokens of each sequence before this call.
        controls: the run-time inputs of the keep rule.
    """

    ids: np.ndarray
    counts: list[int]
    lengths: list[int]
    controls: Controls


# What leaves an exit layer and enters the next one, for the tokens of one call, by the graph's names (`exit_names`).
# The last axis but one is the tokens.
ExitState = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class StageOutput:
    """What a stage gives: logits and kept rows as in `StepOutput`, the exit state if it has one."""

    logits: np.ndarray
    state: ExitState | None
    kept: np.ndarray | None
    kept_by_sequence: np.ndarray | None = None


class Stage(Protocol):
    """One graph of a bundle on one runtime."""

    manifest: Manifest
    layers: range

    def new_memory(self, batch: int, capacity: int) -> Any:
        """Room for the K/V of these layers."""
        ...

    def run(self, memory: Any, call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """Run a call's tokens and append their K/V at `call.lengths`; state: what enters, in a second stage."""
        ...

    def move(self, memory: Any, source: int, target: int, length: int) -> None:
        """Put the K/V of a sequence's first tokens into another row, whose own are lost."""
        ...


class Runner(Protocol):
    """Makes whole steps: every layer runs on every token, or is left out by its gate."""

    manifest: Manifest

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Room for `batch` sequences of up to `capacity` tokens, empty."""
        ...

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        controls: Controls,
        *,
        counts: list[int] | None = None,
        logits: Logits = "last",
    ) -> StepOutput:
        """Run tokens of every sequence and append their K/V to the cache.

        Args:
            cache: its lengths grow by `counts`.
            input_ids: [B, S] int64.
            controls: as in `Call`; the same ones for as long as the cache is not rolled back to nothing.
            counts: tokens of each sequence; None for S of all.
            logits: of each sequence's last token, of all, or none.
        """
        ...

    def move(self, cache: Cache, source: int, target: int) -> None:
        """Put a sequence into another row, whose own is lost; its old row is then empty."""
        ...


def new_cache(batch: int, capacity: int, memory: Any) -> Cache:
    """An empty cache."""
    return Cache(batch, capacity, [0] * batch, [0] * batch, memory)


def call_of(cache: Cache, input_ids: np.ndarray, counts: list[int] | None, controls: Controls) -> Call:
    """The call that appends tokens to a cache.

    Raises:
        ValueError: they do not fit.
    """
    if counts is None:
        counts = [input_ids.shape[1]] * cache.batch
    needed = max(grown(cache.lengths, counts))
    if needed > cache.capacity:
        raise ValueError(f"the cache holds {cache.capacity} tokens, {needed} are needed")
    return Call(input_ids, counts, cache.lengths, controls)


def exit_names(manifest: Manifest) -> dict[str, tuple[int | str, ...]]:
    """What passes from `draft` to `verify`, with its axes; empty without an exit.

    `exit_hidden` [B, S, H]; under the K/V policy `copy` `exit_key` and `exit_value` [B, kv heads, S, D]; and what the
    keep rule carries from layer to layer, [B, S, 1] each.
    """
    verify = manifest.graphs.get("verify")
    asked = {one.name for one in manifest.policy.inputs} if manifest.policy else set()  # a request's exit_threshold
    states = [one for one in verify.inputs if one.name.startswith("exit_") and one.name not in asked] if verify else []
    return {value.name: value.shape for value in states}


def grown(lengths: list[int], counts: list[int]) -> list[int]:
    """Lengths after a call."""
    return list(map(int.__add__, lengths, counts))


def step_output(stage: Stage, call: Call, output: StageOutput) -> StepOutput:
    """What a loop sees of a stage's output."""
    places = [place for place in stage.manifest.skippable_places if place[0] in stage.layers]
    return StepOutput(output.logits, output.kept, sum(call.counts) * len(places), output.kept_by_sequence)
