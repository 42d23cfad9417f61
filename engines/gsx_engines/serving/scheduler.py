"""Continuous batching: requests come and go, and every step continues all running requests.

A request waits in a queue of limited length, is prefilled by itself into a free row of one K/V cache, and from then on
takes part in every step of the batch until it ends; then the last row of the batch moves into its place. Requests of
different budgets, sets of layers, exits or loops share a step, since these are run-time values of each sequence; only
those of a whole call (selection by rank; the budget of a bundle of 0.1.0) must be equal. A speculative request has its
own cache, and makes its rounds between the steps. The text of a request does not depend on other requests: the keep
rule decides token by token, and the noise of sampling depends only on the request's own seed and positions
(`gsx_engines/sampling.py`).

A long prompt is read in pieces between the steps of the others, and not from its start where K/V of its first tokens
are there already (`cache_rows`). A request may have several clients, each with a continuation of its own: the prompt is
read once, and its K/V are copied into the rows of the others.

One thread makes all calls of the runner (`run`); `submit` may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues, controls_for, shared_by_batch, stacked
from gsx_engines.bundle.drafts import DraftKind
from gsx_engines.bundle.hold import with_thresholds
from gsx_engines.generation.continuation import Continuation, held
from gsx_engines.generation.decoding import Decoding
from gsx_engines.generation.generate import check_draft_length
from gsx_engines.generation.reading import read, read_tokens
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.likeliest import Likeliest
from gsx_engines.runners.base import Logits, Runner, StepOutput
from gsx_engines.sampling import Picker, TokenLogprobs, logprobs_of
from gsx_engines.serving.cache_rows import CacheRows
from gsx_engines.serving.memory import Trimmer
from gsx_engines.serving.request import Client, ClosingError, Finished, NewTokens, OverloadedError, Request
from gsx_engines.speculation.draft import draft_on
from gsx_engines.tokens import BundleTokenizer, TextWriter
from gsx_plugins.errors import UsageError

_LOG = logging.getLogger(__name__)
# Logits of a prompt that is scored are all in memory at once: a GiB of them.
MAX_PROMPT_LOGITS = 2**28
# Tokens of a prompt that are read between two steps of other requests: at most so many tokens long do these wait.
PIECE = 256


@dataclass
class _Counts:
    """Rows that a request's tokens kept, of those that the keep rule decided on.

    Args: complete: whether all calls told.
    """

    kept: int = 0
    gated: int = 0
    complete: bool = True


@dataclass
class _Prompt:
    """The prompt of a request; once a continuation has read it, what it counted, and the last token's logits [V]."""

    counts: _Counts = field(default_factory=_Counts)
    cached: int = 0
    logits: np.ndarray | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class _Job:
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
        prompt: _Prompt,
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
        self.counts = _Counts()
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


class Scheduler:
    """Carries out requests, several at a time.

    Args:
        runner: the model (`open_draft_runner` for the bundle's draft).
        tokenizer: for text and stop texts; None to handle only ids.
        slots: how many requests run at once, including speculative ones.
        queue: how many requests may wait for a slot.
        context: how many tokens a request may have, prompt and new ones; None for the model's context.
        piece: how many tokens of a prompt are read between two steps of other requests.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: BundleTokenizer | None = None,
        *,
        slots: int = 8,
        queue: int = 64,
        context: int | None = None,
        piece: int = PIECE,
    ) -> None:
        manifest = runner.manifest
        self.slots, self.queue = slots, queue
        self.context = min(context or manifest.decoder.max_positions, manifest.decoder.max_positions)
        self._runner, self._tokenizer, self._manifest = runner, tokenizer, manifest
        self._draft: DraftKind | None = manifest.draft.draft if manifest.draft else None
        self._chooses_by_call = manifest.selection is not None and manifest.selection.mode == "rank"
        self._whole_prompts = manifest.depends_on_call
        self._cache_rows = CacheRows(runner, slots, self.context, shares=not self._whole_prompts)
        self._cache, self._piece = self._cache_rows.cache, piece
        self._batch: list[_Job] = []  # job n uses row n of the cache
        self._alone: list[_Job] = []  # speculative jobs
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether no more requests are accepted."""
        return self._closed

    @property
    def under_way(self) -> int:
        """How many requests have a slot."""
        return len(self._batch) + len(self._alone)

    @property
    def waiting(self) -> int:
        """How many requests are in the queue."""
        return len(self._waiting)

    def submit(self, request: Request, *clients: Client) -> None:
        """Accept a request; from then on its clients are informed about it, each about a continuation of its own.

        Continuation n is what sequence n of a batch of this prompt gets in `generate`.

        Raises:
            UsageError: the request cannot be carried out.
            OverloadedError: the queue is full.
        """
        if request.stop and self._tokenizer is None:
            raise UsageError("stop texts need a tokenizer", found="a bundle without tokenizer.json")
        if request.speculative and self._draft is None:
            raise UsageError(
                "this bundle has no draft",
                expected="a bundle exported with --draft",
                found="a speculative request",
                todo="gsx export MODEL --draft auto, or send the request without `speculative`: the text is the same",
            )
        check_draft_length(request.draft_length, self._manifest)
        if request.speculative and request.prompt_logprobs:
            raise UsageError("a speculative request reads its prompt in another way", found="log-probabilities of it")
        size = len(request.prompt) * self._manifest.decoder.vocab_size
        if request.prompt_logprobs and size > MAX_PROMPT_LOGITS:
            most = MAX_PROMPT_LOGITS // self._manifest.decoder.vocab_size
            raise UsageError(
                "the prompt is too long to be scored",
                expected=f"at most {most} tokens, whose logits take a GiB",
                found=f"{len(request.prompt)} tokens",
            )
        if len(clients) > max(1, self.queue):
            raise UsageError(
                "a request asks for more continuations than may wait",
                expected=f"at most {max(1, self.queue)}",
                found=str(len(clients)),
            )
        prompt = _Prompt()
        jobs = [
            _Job(request, client, number, prompt, self._runner, self._tokenizer)
            for number, client in enumerate(clients)
        ]
        if jobs[0].sequence.capacity > self.context:
            raise UsageError(
                "prompt and new tokens together are longer than the context of this server",
                expected=f"at most {self.context} tokens",
                found=f"{len(request.prompt)} and {request.max_new_tokens}",
                todo="ask for fewer new tokens, or serve with a larger context",
            )
        with self._changed:
            if self._closed:
                raise ClosingError()
            if len(self._waiting) + len(jobs) > self.queue:
                raise OverloadedError(
                    "the server has more requests than it can handle",
                    expected=f"at most {self.slots} running and {self.queue} waiting",
                    found=f"{self.under_way} and {len(self._waiting)}",
                    todo="send the request again later",
                )
            self._waiting += jobs
            self._changed.notify()

    def run(self, after_turn: Callable[[], None] = lambda: None) -> None:
        """Work until `close` is called, in a thread of its own; after_turn is called after every turn."""
        trimmer = Trimmer()
        while True:
            with self._changed:
                woken = self._changed.wait_for(lambda: self._closed or self._waiting or self.under_way, trimmer.wait)
                if self._closed:
                    break
            if woken:
                self.work()
                after_turn()
                trimmer.worked()
            trimmer.turn()
        for job in [*self._batch, *self._alone, *self._waiting]:
            _inform(partial(job.client.failed, ClosingError()))

    def close(self) -> None:
        """End `run` after its current step; unfinished requests fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def work(self) -> None:
        """One turn: admit a request if no prompt is being read, read a piece of the prompt, and continue all other
        running requests by a step or a round."""
        self._drop_gone()
        self._admit()
        for job in [job for job in self._batch if job.reading]:  # at most one
            self._attempt([job], partial(self._read_piece, job))
        for rows in self._groups():
            self._step(rows)
        for job in list(self._alone):
            self._attempt([job], partial(self._round, job))

    def _drop_gone(self) -> None:
        with self._changed:
            gone = [job for job in self._waiting if job.client.is_gone()]
            for job in gone:
                self._waiting.remove(job)
        leaving = [job for job in [*self._batch, *self._alone] if job.client.is_gone()]
        self._leave(leaving)
        for job in [*gone, *leaving]:
            _inform(job.client.dropped)

    def _admit(self) -> None:
        """Admit a request, one at a time, so that running requests never wait for more than one piece of a prompt."""
        with self._changed:
            if not self._waiting or self.under_way >= self.slots or any(job.reading for job in self._batch):
                return
            job = self._waiting.popleft()
        job.begin()
        if job.request.speculative:
            self._alone.append(job)
        else:
            self._batch.append(job)
            self._works([job], partial(self._enter, job))

    def _enter(self, job: _Job) -> None:
        """Give a request its row, with what is there already of its prompt."""
        afresh = job.request.prompt_logprobs or self._source_of(job) is not None
        shared = self._cache_rows.enter(self._batch.index(job), job.sequence, job.controls, afresh=afresh)
        if job.prompt.logits is None:
            job.prompt.cached = shared

    def _source_of(self, job: _Job) -> int | None:
        """The row of another continuation of the same request, if it has read the prompt."""
        rows = (row for row, one in enumerate(self._batch) if one.prompt is job.prompt and one is not job)
        return None if job.prompt.logits is None else next(rows, None)

    def _read_piece(self, job: _Job) -> None:
        """Read the next tokens of a prompt, or all that are left if nobody waits for a step meanwhile; after the last
        one, choose the first new token."""
        prompt, tokens, row = job.prompt, job.sequence.prompt, self._batch.index(job)
        if (source := self._source_of(job)) is not None:
            self._cache_rows.copy(source, row, len(tokens))
        else:
            done, whole = self._cache.lengths[row], job.request.prompt_logprobs
            at_once = whole or self._whole_prompts or self.under_way == 1
            piece = tokens[done:] if at_once else tokens[done : done + self._piece]
            last = done + len(piece) == len(tokens)
            unread = [piece if at == row else () for at in range(self._cache.batch)]
            logits: Logits = "all" if whole else "last" if last else "none"
            output = read_tokens(self._runner, self._cache, unread, self._controls([job]), logits)
            job.count(output, row, len(piece), len(piece))
            if not last:
                return
            prompt.counts, prompt.logits = replace(job.counts), output.logits[row, -1].copy()
            if whole:
                count, behind = job.request.logprobs or 0, tokens[1:]
                scores = zip(output.logits[row], behind, strict=False)
                prompt.logprobs = tuple(logprobs_of(one, token, count) for one, token in scores)
        job.counts = replace(prompt.counts)
        assert prompt.logits is not None
        job.sequence.take(prompt.logits)

    def _groups(self) -> list[list[_Job]]:
        """The jobs of the batch, grouped by the steps that they may share.

        Jobs share a step if their run-time values for the whole call are equal. Under rank selection no jobs share one,
        since their tokens would compete with each other.
        """
        groups: dict[object, list[_Job]] = {}
        for job in (job for job in self._batch if not job.reading):
            same = shared_by_batch(job.controls)
            groups.setdefault(id(job) if self._chooses_by_call else same, []).append(job)
        return list(groups.values())

    def _step(self, jobs: list[_Job]) -> None:
        logits: dict[_Job, np.ndarray | Likeliest] = {}

        def step() -> None:
            rows = self._rows(jobs)
            output = read(self._runner, self._cache, rows, self._controls(jobs))
            for row, sequence in enumerate(rows):
                if sequence is not None:
                    self._batch[row].count(output, row, 1, len(jobs))
                    logits[self._batch[row]] = output.behind(row, 0)

        if self._works(jobs, step):
            # Each job chooses its token separately: logits that no token can be chosen from must not fail other jobs.
            for job, scores in logits.items():
                self._attempt([job], partial(job.sequence.take, scores))

    def _round(self, job: _Job) -> None:
        if job.decoding is None:
            assert self._draft is not None
            draft = draft_on(self._runner, self._draft)
            length = job.request.draft_length
            job.decoding = Decoding(self._runner, [job.sequence], job.controls, draft, length)
            job.decoding.start()
        else:
            job.decoding.round()

    def _rows(self, jobs: list[_Job]) -> list[Continuation | None]:
        """The sequences of some jobs by their rows in the cache."""
        return [job.sequence if job in jobs else None for job in self._batch] + [None] * (
            self._cache.batch - len(self._batch)
        )

    def _controls(self, jobs: list[_Job]) -> RuntimeValues:
        """The run-time values of a call for some jobs; values for each sequence are at the rows of the jobs."""
        rows = [job.controls if job in jobs else None for job in self._batch]
        return stacked([*rows, *[None] * (self._cache.batch - len(rows))])

    def _attempt(self, jobs: list[_Job], work: Callable[[], object]) -> None:
        """Do the work of some jobs, and report to the clients of those that have tokens."""
        if self._works(jobs, work):
            self._leave([job for job in jobs if not job.reading and _inform(job.report)])

    def _works(self, jobs: list[_Job], work: Callable[[], object]) -> bool:
        """Do the work of some jobs; returns whether it succeeded. A failure affects only these jobs."""
        try:
            work()
        except Exception as error:
            _LOG.exception("a step failed")
            for job in jobs:
                _inform(partial(job.client.failed, error))
            self._leave(jobs, failed=True)
            return False
        return True

    def _leave(self, jobs: list[_Job], *, failed: bool = False) -> None:
        """Free the slots of some jobs; the last row of the batch moves into each freed row."""
        for job in jobs:
            if job in self._alone:
                self._alone.remove(job)
                continue
            row, last = self._batch.index(job), len(self._batch) - 1
            self._cache_rows.leave(row, last, failed=failed)
            self._batch[row] = self._batch[last]
            self._batch.pop()


def _inform(inform: Callable[[], bool | None]) -> bool:
    """Call a client; returns whether its request is over, which is also the case if the client cannot be reached."""
    try:
        return bool(inform())
    except Exception:
        _LOG.warning("a client can no longer be informed about its request", exc_info=True)
        return True
