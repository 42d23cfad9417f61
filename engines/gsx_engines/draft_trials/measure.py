"""Measuring the speed of a draft, and its best draft length."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gsx_engines.bundle.drafts import DraftMeasurement
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.base import Runner
from gsx_engines.speculation.draft import Draft
from gsx_engines.speculation.length import LONGEST
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# The shortest context with room for a prompt and some new tokens.
SHORTEST_CONTEXT = 64
# Draft lengths of the first runs, which show acceptance by position and the cost of draft steps and verifications.
_PROBE_LENGTHS = (8, 2)
# How long a plain run over all prompts should take, in seconds, and the limits of the new tokens for each prompt. A
# draft has three runs of its own beside it, of which the one with 8 drafted tokens may take twice as long.
_RUN_SECONDS, _FEWEST, _MOST = 4.0, 12, 64


@dataclass(frozen=True)
class Plain:
    """Plain decoding of the prompts, as the baseline.

    Args:
        runner: the whole model.
        prompts: token ids.
        new_tokens: for each prompt.
    """

    runner: Runner
    prompts: Sequence[Sequence[int]]
    new_tokens: int

    def run(self, prompt: Sequence[int]) -> Generation:
        """Continue one prompt, beyond any end-of-text token."""
        return generate(self.runner, [prompt], max_new_tokens=self.new_tokens, stop_ids=[])


def plain_run(runner: Runner, prompts: Sequence[Sequence[int]]) -> Plain:
    """Plain decoding with as many new tokens as this machine generates in a few seconds."""
    generate(runner, [prompts[0]], max_new_tokens=4, stop_ids=[])  # warm-up: some things load on first use
    started = time.perf_counter()
    generate(runner, [prompts[0]], max_new_tokens=_FEWEST, stop_ids=[])
    each = (time.perf_counter() - started) / _FEWEST
    room = runner.manifest.decoder.max_positions - max(len(prompt) for prompt in prompts)
    return Plain(runner, prompts, min(room, max(_FEWEST, min(_MOST, int(_RUN_SECONDS / len(prompts) / each)))))


def measure_draft(draft: Draft, plain: Plain, on_progress: OnProgress = silent) -> DraftMeasurement:
    """Measure a draft: find its best length by first runs, then its speed at that length.

    Speculative and plain runs alternate, prompt by prompt, so that both run under the same conditions.

    Args:
        draft: the draft to measure.
        plain: the baseline, with the prompts.
        on_progress: called after every run over all prompts.
    """
    probes = []
    runs = len(_PROBE_LENGTHS) + 1
    for length in _PROBE_LENGTHS:
        probes.append([_speculate(draft, plain, prompt, length).stats for prompt in plain.prompts])
        on_progress(Progress("measuring the draft", len(probes), runs))
    length = best_length(probes[0], probes[1])
    seconds, plain_seconds, tokens = 0.0, 0.0, 0
    for prompt in plain.prompts:
        stats = _speculate(draft, plain, prompt, length).stats
        seconds += stats.decode_seconds
        tokens += stats.new_tokens - 1
        plain_seconds += plain.run(prompt).stats.decode_seconds
    on_progress(Progress("measuring the draft", runs, runs))
    drafted, accepted = (sum(counts) for counts in (_by_place(probes[0], "drafted"), _by_place(probes[0], "accepted")))
    return DraftMeasurement(
        draft=draft.kind,
        length=length,
        acceptance=accepted / max(drafted, 1),
        tokens_per_second=tokens / seconds,
        plain_tokens_per_second=tokens / plain_seconds,
    )


def best_length(long: Sequence[GenerationStats], short: Sequence[GenerationStats]) -> int:
    """The draft length with the most tokens per second, by acceptance at each position and the times of two runs.

    Args:
        long, short: runs at the two lengths of `_PROBE_LENGTHS`, whose verifications differ in their number of rows.
    """
    drafted, accepted = _by_place(long, "drafted"), _by_place(long, "accepted")
    rates = [hit / max(tries, 1) for hit, tries in zip(accepted, drafted, strict=True)]
    step = sum(s.draft_seconds for s in long) / (_PROBE_LENGTHS[0] * sum(s.decode_steps for s in long))
    rows = [length + 1 for length in _PROBE_LENGTHS]
    costs = [sum(s.verify_seconds for s in run) / sum(s.decode_steps for s in run) for run in (long, short)]
    slope = max((costs[0] - costs[1]) / (rows[0] - rows[1]), 0.0)

    def speed(length: int) -> float:
        tokens = 1.0
        right = 1.0
        for place in range(length):
            right *= rates[min(place, len(rates) - 1)] if rates else 0.0
            tokens += right
        return tokens / (length * step + costs[1] + slope * (length + 1 - rows[1]))

    return max(range(1, LONGEST + 1), key=speed)


def candidate_exits(named: Sequence[int], layers: int) -> list[int]:
    """Exits to try: those that the model was trained for, else some in its lower half.

    Args:
        named: the exits that the checkpoint names.
        layers: how many layers the model has.
    Raises:
        UsageError: a model with one layer has no exit.
    """
    if layers < 2:
        raise UsageError("--draft auto needs an exit inside the model", expected="2 layers or more", found=str(layers))
    shares = {math.ceil(layers * share) for share in (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)}
    inside = {layer for layer in named if 0 < layer < layers}
    return sorted(inside or {layer for layer in shares if 0 < layer < layers})


def _speculate(draft: Draft, plain: Plain, prompt: Sequence[int], length: int) -> Generation:
    return generate(
        draft.runner, [prompt], max_new_tokens=plain.new_tokens, stop_ids=[], draft=draft, draft_length=length
    )


def _by_place(runs: Sequence[GenerationStats], name: str) -> list[int]:
    rows = [getattr(stats, name) for stats in runs]
    return [sum(row[place] for row in rows if place < len(row)) for place in range(max(map(len, rows), default=0))]
