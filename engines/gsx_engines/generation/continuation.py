"""One prompt that is being continued: how its tokens are chosen, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.hold import Hold, hold_of
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.likeliest import Likeliest, all_of
from gsx_engines.runners.base import Runner
from gsx_engines.sampling import Picker, TokenLogprobs, adjusted, check_logprobs, logprobs_of
from gsx_plugins.errors import UsageError

FinishReason = Literal["end-of-text", "length", "context", "stopped"]


class Continuation:
    """One prompt that is being continued.

    Args:
        manifest: of the model.
        prompt: token ids.
        max_new_tokens: the maximum; the model's context may end it earlier (finish "context").
        picker: chooses the tokens.
        number: of the sequence; the picker's noise depends on it.
        on_token: called with every new token; returning True ends the sequence (finish "stopped").
        stops: tokens that end it; they stay part of it. None for the model's end-of-text tokens.
        logprobs: how many of the likeliest tokens to record beside each chosen one; None to record nothing.
        hold: holds its budget; None for thresholds that stay.
    Raises:
        UsageError: an empty prompt, one beyond the context, ids outside the vocabulary, fewer than one new token, too
            many log-probabilities.
    """

    def __init__(
        self,
        manifest: Manifest,
        prompt: Sequence[int],
        max_new_tokens: int,
        picker: Picker,
        number: int,
        on_token: Callable[[int], bool],
        stops: frozenset[int] | None = None,
        logprobs: int | None = None,
        hold: Hold | None = None,
    ) -> None:
        _check(prompt, max_new_tokens, manifest)
        picker.sampling.check_ids(manifest.decoder.vocab_size)
        check_logprobs(logprobs)
        self.prompt, self.picker, self.number, self.hold = prompt, picker, number, hold
        room = manifest.decoder.max_positions - len(prompt)
        self.limit = min(max_new_tokens, room)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []  # of the tokens, if they are recorded
        self.finish: FinishReason | None = None
        self._at_limit: FinishReason = "length" if max_new_tokens <= room else "context"
        self._on_token = on_token
        self._stops = frozenset(manifest.decoder.eos_ids) if stops is None else stops
        self._logprobs_count = logprobs

    @property
    def left(self) -> int:
        """How many more tokens it may get."""
        return 0 if self.finish else self.limit - len(self.tokens)

    @property
    def most_drafts(self) -> int:
        """How many tokens may be drafted now: verification adds one by itself, and reads them all with the same
        thresholds."""
        return self.left - 1 if self.hold is None else min(self.left, self.hold.left_in_block) - 1

    @property
    def place(self) -> int:
        """Position of the next new token."""
        return len(self.prompt) + len(self.tokens)

    @property
    def capacity(self) -> int:
        """How many tokens its cache must hold."""
        return len(self.prompt) + self.limit

    @property
    def unread(self) -> Sequence[int]:
        """The tokens that the model has to read to choose the next one: first the prompt, later the newest token."""
        return self.tokens[-1:] or self.prompt

    def guess(self, logits: np.ndarray | Likeliest, drafted: Sequence[int]) -> tuple[int, float]:
        """The token that would come behind drafted ones, and the draft's confidence in it; logits [V] of the draft."""
        logits = self._adjusted(logits, drafted)
        token = self.picker.pick(logits, self.number, self.place + len(drafted))
        return token, self.picker.confidence(logits)

    def take(self, logits: np.ndarray | Likeliest) -> int:
        """Choose the next token from its logits [V], and append it."""
        whole = None if self._logprobs_count is None else all_of(logits)
        token = self.picker.pick(self._adjusted(logits if whole is None else whole), self.number, self.place)
        self.tokens.append(token)
        if whole is not None and self._logprobs_count is not None:
            self.logprobs.append(logprobs_of(whole, token, self._logprobs_count))
        stopped = self._on_token(token)
        if token in self._stops:
            self.finish = "end-of-text"
        elif stopped:
            self.finish = "stopped"
        elif len(self.tokens) == self.limit:
            self.finish = self._at_limit
        return token

    def _adjusted(self, logits: np.ndarray | Likeliest, drafted: Sequence[int] = ()) -> np.ndarray | Likeliest:
        sampling = self.picker.sampling
        if not sampling.adjusts:
            return logits
        return adjusted(all_of(logits), sampling, self.prompt, [*self.tokens, *drafted])


def held(runner: Runner, keep: KeepSettings) -> Hold | None:
    """What holds a request's budget; None if it does not ask for that.

    Raises:
        UsageError: the runtime does not tell what each token kept.
    """
    hold = hold_of(runner.manifest, keep)
    if hold is not None and not runner.counts_tokens:
        raise UsageError(
            "these engines do not tell how many branches each token kept, so no budget can be held",
            expected="engines with the output kept_by_token",
            found="engines that an older gsx built",
            todo="build them again with gsx build, or leave out the hold",
        )
    return hold


def _check(prompt: Sequence[int], max_new_tokens: int, manifest: Manifest) -> None:
    shape = manifest.decoder
    if max_new_tokens < 1:
        raise UsageError("the number of new tokens is out of range", expected="at least 1", found=str(max_new_tokens))
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
            "the prompt contains ids outside the vocabulary",
            expected=f"0 to {shape.vocab_size - 1}",
            found=f"{min(prompt)} to {max(prompt)}",
        )
