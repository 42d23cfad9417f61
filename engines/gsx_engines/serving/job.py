"""A continuation in the scheduler: what it reads and chooses, what it counts, and what its client is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gsx_engines.bundle.controls import controls_for
from gsx_engines.bundle.hold import with_thresholds
from gsx_engines.generation.continuation import Continuation, held
from gsx_engines.generation.decoding import Decoding
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.base import Runner, StepOutput
from gsx_engines.sampling import Picker, TokenLogprobs
from gsx_engines.serving.request import Client, Finished, NewTokens, Request
from gsx_engines.tokens import BundleTokenizer, TextWriter

_LOG = logging.getLogger(__name__)


@dataclass
class Counts:
    """Rows that a request's tokens kept, of those that the keep rule decided on.

    Args: complete: whether all calls told.
    """

    kept: int = 0
    gated: int = 0
    complete: bool = True


@dataclass
class Prompt:
    """The prompt of a request; once a continuation has read it, what it counted, and the last token's logits [V]."""

    counts: Counts = field(default_factory=Counts)
    cached: int = 0
    logits: np.ndarray | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class Job:
    """A continuation that waits or runs, with results that its client has not received yet.

    Args:
        request: what is continued.
        client: receives the continuation.
        number: of the continuation in its request; the sampling's noise depends on it.
        prompt: shared by the continuations of a request.
    """

    def __init__(
        self,
        request: Request,
        client: Client,
        number: int,
        prompt: Prompt,
        runner: Runner,
        tokenizer: BundleTokenizer | None,
    ) -> None:
        self.client, self.request, self.prompt = client, request, prompt
        self.controls = controls_for(runner.manifest, request.keep, [len(request.prompt)])
        self._ids: list[int] = []
        self._text: list[str] = []
        self._writer = (
            TextWriter(tokenizer.stream(request.prompt), request.stop, self._text.append) if tokenizer else None
        )
        self.sequence = Continuation(
            runner.manifest,
            request.prompt,
            request.max_new_tokens,
            Picker(request.sampling),
            number,
            self._on_token,
            request.stop_ids,
            request.logprobs,
            held(runner, request.keep),
        )
        self.decoding: Decoding | None = None  # of a speculative request
        self._arrived = time.perf_counter()
        self._began = self._first = 0.0
        self._rows: list[np.ndarray] = []  # kept rows that the client has not received yet
        self.counts = Counts()
        self._steps = 0

    @property
    def reading(self) -> bool:
        """Whether it is still reading its prompt."""
        return not self.sequence.tokens

    def begin(self) -> None:
        """Record that it leaves the queue."""
        self._began = time.perf_counter()

    def count(self, output: StepOutput, row: int, tokens: int, all_tokens: int) -> None:
        """Count its part of a call.

        Args:
            output: of the call.
            row: of the request.
            tokens, all_tokens: tokens of the request, and of all sequences in the call.
        """
        self._steps += not self.reading
        hold = self.sequence.hold
        if hold is not None and not self.reading:
            assert output.kept_by_token is not None
            if hold.read(int(output.kept_by_token[row, 0])):
                self.controls = with_thresholds(self.controls, [hold])
        if output.kept is None:
            return
        counts = self.counts
        if output.kept_by_sequence is not None:
            counts.kept += int(output.kept_by_sequence[row].sum())
        elif tokens == all_tokens:
            counts.kept += int(output.kept.sum())
        else:
            counts.complete = False
        counts.gated += output.gated_rows * tokens // all_tokens
        if self.request.kept and not self.reading:
            if output.kept_by_sequence is not None:
                self._rows.append(output.kept_by_sequence[row])
            elif all_tokens == 1:
                self._rows.append(output.kept)

    def report(self) -> bool:
        """Send the client what is new; returns whether the request has ended."""
        self._first = self._first or time.perf_counter()
        ended = self.sequence.finish is not None
        if ended and self._writer is not None:
            self._writer.finish()
        logprobs = self.sequence.logprobs
        new = NewTokens(
            tuple(self._ids), "".join(self._text), tuple(logprobs[len(logprobs) - len(self._ids) :]), tuple(self._rows)
        )
        self._ids.clear()
        self._text.clear()
        self._rows.clear()
        self.client.tokens(new)
        if ended:
            self.client.finished(self._result())
        return ended

    def _on_token(self, token: int) -> bool:
        self._ids.append(token)
        if token in (self.request.stop_ids or ()):
            return False
        return self._writer is not None and self._writer.push(token)

    def _result(self) -> Finished:
        stats = self.decoding.stats() if self.decoding is not None else self._stats()
        finish = self.sequence.finish
        assert finish is not None
        waited, first = self._began - self._arrived, self._first - self._arrived
        return Finished(finish, waited, first, stats, self.prompt.logprobs, self.prompt.cached)

    def _stats(self) -> GenerationStats:
        hold = self.sequence.hold
        return GenerationStats(
            prompt_tokens=len(self.sequence.prompt),
            new_tokens=len(self.sequence.tokens),
            prefill_seconds=self._first - self._began,
            decode_seconds=time.perf_counter() - self._first if self._steps else 0.0,
            decode_steps=self._steps,
            kept_rows=self.counts.kept if self.counts.complete else 0,
            gated_rows=self.counts.gated if self.counts.complete else 0,
            held_kept_rows=hold.kept if hold is not None else 0,
            held_gated_rows=hold.gated if hold is not None else 0,
        )


def inform(call: Callable[[], bool | None]) -> bool:
    """Call a client; returns whether its request is over, which is also the case if the client cannot be reached."""
    try:
        return bool(call())
    except Exception:
        _LOG.warning("a client can no longer be informed about its request", exc_info=True)
        return True
