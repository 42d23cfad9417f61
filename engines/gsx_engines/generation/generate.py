"""Continuing prompts that begin together. Where sequences come and go (`gsx_engines/serving`), a scheduler puts
`Continuation`s into the rows of one cache, and calls `read` and `take` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, controls_for
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.generation.continuation import Continuation, FinishReason, held
from gsx_engines.generation.decoding import Decoding
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.base import Runner
from gsx_engines.sampling import GREEDY, Picker, Sampling, TokenLogprobs
from gsx_engines.speculation.draft import Draft
from gsx_plugins.errors import UsageError

if TYPE_CHECKING:
    from gsx_engines.speculation.adapt import SkipSetSearch

# Called with (sequence, token); returning True ends the sequence.
OnToken = Callable[[int, int], bool]


@dataclass(frozen=True)
class Generated:
    """The result of one sequence: its new tokens, why it ended, and the tokens' log-probabilities, if wanted."""

    tokens: list[int]
    finish: FinishReason
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Generation:
    """The results of all sequences in the order of the prompts, and the counters."""

    sequences: list[Generated]
    stats: GenerationStats


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    keep: KeepSettings | Sequence[KeepSettings] = AS_EXPORTED,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    draft: Draft | None = None,
    draft_length: int | None = None,
    search: SkipSetSearch | None = None,
    logprobs: int | None = None,
    on_token: OnToken = lambda sequence, token: False,
) -> Generation:
    """Continue prompts.

    Args:
        runner: the model; with a draft, the draft's own runner.
        prompts: token ids, one list for each sequence.
        max_new_tokens: for each sequence; the model's context may end it earlier (finish "context").
        keep: what a request asks of the keep rule; one for all prompts, or one for each.
        sampling: how tokens are chosen.
        stop_ids: tokens that end a sequence; they stay part of it. None for the model's end-of-text tokens.
        draft: guesses tokens ahead; None for plain decoding.
        draft_length: tokens drafted at once, 0 for plain decoding; None to find it while generating.
        search: improves the draft's set of branches while generating.
        logprobs: record each token's log-probability, and those of so many likeliest tokens; None for none.
        on_token: called with every new token; returning True ends that sequence (finish "stopped").
    Raises:
        UsageError: an empty prompt, one beyond the context, ids outside the vocabulary, a setting that the keep rule
            does not accept.
    """
    manifest = runner.manifest
    if not prompts:
        raise UsageError("no prompt was given")
    check_draft_length(draft_length, manifest)
    picker = Picker(sampling)
    stops = None if stop_ids is None else frozenset(stop_ids)
    controls = controls_for(manifest, keep, [len(prompt) for prompt in prompts])
    settings = [keep] * len(prompts) if isinstance(keep, KeepSettings) else keep
    sequences = [
        Continuation(
            manifest,
            prompt,
            max_new_tokens,
            picker,
            number,
            partial(on_token, number),
            stops,
            logprobs,
            held(runner, settings[number]),
        )
        for number, prompt in enumerate(prompts)
    ]
    decoding = Decoding(runner, sequences, controls, draft, draft_length, search)
    decoding.start()
    while not decoding.ended:
        decoding.round()
    return Generation([Generated(s.tokens, s.finish or "length", s.logprobs) for s in sequences], decoding.stats())


def check_draft_length(length: int | None, manifest: Manifest) -> None:
    """Refuse a number of drafted tokens that no round can have."""
    if length is not None and not 0 <= length <= manifest.decoder.max_positions:
        raise UsageError(
            "the draft length is out of range",
            expected=f"0 (plain decoding) to {manifest.decoder.max_positions}",
            found=str(length),
        )
