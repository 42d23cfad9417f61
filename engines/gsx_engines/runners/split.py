"""A runner with two stages and an exit between them: the layers that draft, and the layers that verify.

Both halves share one cache. The exit states of drafted tokens wait in it until the later layers run on them, so no
layer runs twice on an accepted token, and rejected tokens are forgotten by rolling back the cache's lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.runners.base import (
    Cache,
    Call,
    ExitState,
    Logits,
    Stage,
    StepOutput,
    call_of,
    grown,
    new_cache,
    step_output,
)


@dataclass
class _Memory:
    """K/V of both stages, and the calls whose exit states the later layers have not processed yet."""

    early: Any
    late: Any
    waiting: list[tuple[Call, ExitState]] = field(default_factory=list)


# Beside the exit states that wait: how many branches of the early layers kept each token, [B, S, 1].
_KEPT = "kept of the early layers"


class SplitRunner:
    """Runs `draft.onnx` and `verify.onnx`, or engines built from them; see `Runner` for whole steps.

    Args:
        early: the layers below the exit.
        late: the others.
    """

    def __init__(self, early: Stage, late: Stage) -> None:
        self.early, self.late = early, late
        self.manifest = early.manifest
        self.counts_tokens = early.counts_tokens and late.counts_tokens

    @property
    def exit_layer(self) -> int:
        """How many layers the draft runs."""
        return self.early.layers.stop

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        memory = _Memory(self.early.new_memory(batch, capacity), self.late.new_memory(batch, capacity))
        return new_cache(batch, capacity, memory)

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        controls: RuntimeValues,
        *,
        counts: list[int] | None = None,
        logits: Logits = "last",
    ) -> StepOutput:
        """See `Runner`: a draft without logits, then its verification."""
        first = self.draft(cache, input_ids, controls, counts=counts, logits="none")
        second = self.verify(cache, logits=logits)
        return joined_output(first, second)

    def copy(self, cache: Cache, source: int, target: int, length: int) -> None:
        """See `Runner`; not allowed between a draft and its verification."""
        memory: _Memory = cache.memory
        assert not memory.waiting, "drafted tokens are waiting in their rows"
        self.early.copy(memory.early, source, target, length)
        self.late.copy(memory.late, source, target, length)
        cache.copy(source, target, length)

    def draft(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        controls: RuntimeValues,
        *,
        counts: list[int] | None = None,
        logits: Logits = "last",
    ) -> StepOutput:
        """Run only the early layers; arguments as in `step`. The logits are those at the exit."""
        memory: _Memory = cache.memory
        call = call_of(cache, input_ids, counts, controls)
        output = self.early.run(memory.early, call, None, logits)
        assert output.state is not None
        waits = dict(output.state)
        if output.kept_by_token is not None:
            waits[_KEPT] = output.kept_by_token[..., None]
        memory.waiting.append((call, waits))
        cache.lengths = grown(call.lengths, call.counts)
        return step_output(self.early, call, output)

    def verify(self, cache: Cache, *, logits: Logits = "all") -> StepOutput:
        """Run the later layers on all tokens that were drafted since the last verification and not rolled back.

        Returns: logits as in `StepOutput`, where S is the largest number of such tokens in any sequence. The kept
            rows are those of the later layers, but `kept_by_token` has those of all layers.
        """
        memory: _Memory = cache.memory
        call, state = _joined(memory.waiting, cache)
        memory.waiting.clear()
        early = state.pop(_KEPT, None)
        output = self.late.run(memory.late, call, state, logits)
        cache.verified = list(cache.lengths)
        step = step_output(self.late, call, output)
        if early is None or step.kept_by_token is None:
            return replace(step, kept_by_token=None)
        return replace(step, kept_by_token=step.kept_by_token + early[..., 0])


def joined_output(early: StepOutput, late: StepOutput) -> StepOutput:
    """The outputs of both halves as one; late: as `SplitRunner.verify` returns it."""
    kept = None if early.kept is None or late.kept is None else early.kept + late.kept
    each = None
    if early.kept_by_sequence is not None and late.kept_by_sequence is not None:
        each = early.kept_by_sequence + late.kept_by_sequence
    return StepOutput(late.scores, kept, early.gated_rows + late.gated_rows, each, late.kept_by_token)


def _joined(waiting: list[tuple[Call, ExitState]], cache: Cache) -> tuple[Call, dict[str, np.ndarray]]:
    """All waiting tokens as one call; those of each sequence are at the front of its row."""
    counts = [length - verified for length, verified in zip(cache.lengths, cache.verified, strict=True)]
    controls = waiting[-1][0].controls
    size = max(counts)
    if min(counts) == size == sum(call.ids.shape[1] for call, _ in waiting):
        # Every sequence has all of them, so they only have to be concatenated.
        if len(waiting) == 1:
            return Call(waiting[0][0].ids, counts, cache.verified, controls), dict(waiting[0][1])
        ids = np.concatenate([call.ids for call, _ in waiting], axis=1)
        joined = {n: np.concatenate([state[n] for _, state in waiting], axis=-2) for n in waiting[0][1]}
    else:
        ids = np.zeros((cache.batch, size), np.int64)
        joined = {
            name: np.zeros((*part.shape[:-2], size, part.shape[-1]), part.dtype) for name, part in waiting[0][1].items()
        }
        for call, state in waiting:
            for row in range(cache.batch):
                start = call.lengths[row] - cache.verified[row]
                stop = min(start + call.counts[row], counts[row])
                if stop > start:
                    ids[row, start:stop] = call.ids[row, : stop - start]
                    for name, part in state.items():
                        joined[name][row, ..., start:stop, :] = part[row, ..., : stop - start, :]
    return Call(ids, counts, cache.verified, controls), joined
