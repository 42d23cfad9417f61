"""The decoding loop, once, over the runner interface.

A batch is padded on the left, so that the newest token of every sequence stands in the last column. A sequence
that has ended goes on as padding, which no branch computes, until all have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from engines.bundle.manifest import Manifest, check_budget
from engines.errors import UsageError
from engines.runners.base import Runner, StepOutput
from engines.sampling import GREEDY, Sampling, pick

FinishReason = Literal["end-of-text", "length", "context", "stopped"]
# Called with (sequence, token); returns whether the sequence is to end here.
OnToken = Callable[[int, int], bool]


@dataclass(frozen=True)
class GenerationStats:
    """Counters of one `generate` call.

    Args:
        prompt_tokens, new_tokens: over all sequences, padding left out.
        prefill_seconds: time of the first call, until the first tokens are chosen.
        decode_seconds: time of all later calls.
        decode_steps: number of those.
        kept_rows, gated_rows: rows that branches ran on, and rows that came before their gates; 0 without gates.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    kept_rows: int = 0
    gated_rows: int = 0

    @property
    def kept_share(self) -> float | None:
        """Share of (token, branch) pairs kept; None without gates."""
        return self.kept_rows / self.gated_rows if self.gated_rows else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens after the first of each sequence, by the time that they took."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else None


@dataclass(frozen=True)
class Generated:
    """One sequence's result: the new tokens, and why it ended."""

    tokens: list[int]
    finish: FinishReason


@dataclass(frozen=True)
class Generation:
    """All sequences, in the order of the prompts, and the counters."""

    sequences: list[Generated]
    stats: GenerationStats


@dataclass
class _Sequence:
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    budget: float | None = None,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    on_token: OnToken = lambda sequence, token: False,
) -> Generation:
    """Continue prompts.

    Args:
        prompts: token ids, one list a sequence.
        max_new_tokens: per sequence; the model's context may end it earlier (finish "context").
        budget: share kept; None for the exported default.
        stop_ids: tokens that end a sequence (kept in its tokens); None for the model's end-of-text.
        on_token: called with every new token; returning True ends that sequence (finish "stopped").
    Raises:
        UsageError: an empty prompt, one beyond the context, ids outside the vocabulary, a budget that is not one.
    """
    manifest = runner.manifest
    _check(prompts, max_new_tokens, manifest)
    select = select_for(manifest, budget)
    stops = set(manifest.decoder.eos_ids if stop_ids is None else stop_ids)
    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(sampling.seed).spawn(len(prompts))]
    longest = max(len(prompt) for prompt in prompts)
    steps = min(max_new_tokens, manifest.decoder.max_positions - longest)
    sequences = [_Sequence() for _ in prompts]

    capacity = longest + max(steps, 1)
    ids, mask = _left_padded(prompts, longest, capacity)
    alive = np.ones((len(prompts), 1), np.int64)
    lengths = np.array([[len(prompt)] for prompt in prompts])
    cache = runner.new_cache(len(prompts), capacity)
    started = time.perf_counter()
    counters = _Counters(manifest)
    positions = np.maximum(mask[:, :longest].cumsum(axis=1) - 1, 0)
    filled, new_rows, prefill_seconds = longest, int(lengths.sum()), 0.0
    for step in range(steps):
        output = runner.step(cache, ids, mask[:, :filled], positions, select)
        counters.add(output, new_rows)
        ids = np.zeros((len(prompts), 1), np.int64)
        for row, sequence in enumerate(sequences):
            if sequence.finish is not None:
                continue
            token = pick(output.logits[row, -1], sampling, rngs[row])
            sequence.tokens.append(token)
            ids[row, 0] = token
            stopped = on_token(row, token)
            if token in stops:
                sequence.finish = "end-of-text"
            elif stopped:
                sequence.finish = "stopped"
            alive[row, 0] = sequence.finish is None
        if step == 0:
            prefill_seconds = time.perf_counter() - started
        new_rows = int(alive.sum())
        if not new_rows:
            break
        mask[:, filled : filled + 1] = alive
        filled += 1
        positions = lengths
        lengths = lengths + alive
    else:
        for sequence in sequences:
            sequence.finish = sequence.finish or ("length" if steps == max_new_tokens else "context")
    total = time.perf_counter() - started
    stats = GenerationStats(
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        new_tokens=sum(len(sequence.tokens) for sequence in sequences),
        prefill_seconds=prefill_seconds,
        decode_seconds=total - prefill_seconds if counters.calls > 1 else 0.0,
        decode_steps=max(counters.calls - 1, 0),
        kept_rows=counters.kept,
        gated_rows=counters.gated,
    )
    return Generation([Generated(s.tokens, s.finish or "length") for s in sequences], stats)


def select_for(manifest: Manifest, budget: float | None) -> np.ndarray | None:
    """The graph's `thresholds` or `budget` input for a budget (None: the exported one); None without gates."""
    selection = manifest.selection
    if selection is None:
        if budget not in (None, 1, 1.0):
            raise UsageError("this bundle has no gates", expected="budget 1, or none", found=f"{budget:g}")
        return None
    wanted = selection.budget if budget is None else budget
    check_budget(wanted)
    if selection.mode == "rank":
        return np.array(wanted, np.float32)
    return selection.thresholds_for(wanted)


@dataclass
class _Counters:
    manifest: Manifest
    calls: int = 0
    kept: int = 0
    gated: int = 0

    def add(self, output: StepOutput, tokens: int) -> None:
        """Count a call; `tokens` are its tokens, padding left out."""
        self.calls += 1
        if output.kept is not None and self.manifest.gates is not None:
            branches = self.manifest.gates.branches
            self.kept += int(output.kept.sum())
            self.gated += tokens * self.manifest.decoder.num_layers * len(branches)


def _left_padded(prompts: Sequence[Sequence[int]], longest: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, longest] and mask [B, capacity], int64; padding has id 0 and mask 0, as have columns to come."""
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros((len(prompts), capacity), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) : longest] = 1
    return ids, mask


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, manifest: Manifest) -> None:
    if not prompts:
        raise UsageError("no prompt was given")
    if max_new_tokens < 1:
        raise UsageError("max new tokens", expected="at least 1", found=str(max_new_tokens))
    shape = manifest.decoder
    for prompt in prompts:
        if not prompt:
            raise UsageError("the prompt is empty", expected="at least one token")
        if len(prompt) >= shape.max_positions:
            raise UsageError(
                "the prompt is longer than the model's context",
                expected=f"fewer than {shape.max_positions} tokens",
                found=f"{len(prompt)} tokens",
            )
        if min(prompt) < 0 or max(prompt) >= shape.vocab_size:
            raise UsageError(
                "the prompt has ids outside the vocabulary",
                expected=f"0 to {shape.vocab_size - 1}",
                found=f"{min(prompt)} to {max(prompt)}",
            )
