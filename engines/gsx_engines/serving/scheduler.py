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
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues, shared_by_batch, stacked
from gsx_engines.bundle.drafts import DraftKind
from gsx_engines.errors import LostGpuError
from gsx_engines.generation.continuation import Continuation
from gsx_engines.generation.decoding import Decoding
from gsx_engines.generation.generate import check_draft_length
from gsx_engines.generation.reading import read, read_tokens
from gsx_engines.likeliest import Likeliest
from gsx_engines.runners.base import Logits, Runner
from gsx_engines.sampling import logprobs_of
from gsx_engines.serving.cache_rows import CacheRows
from gsx_engines.serving.job import Job, Prompt, inform
from gsx_engines.serving.memory import Trimmer
from gsx_engines.serving.request import Client, ClosingError, Nobody, OverloadedError, Request
from gsx_engines.speculation.draft import draft_on
from gsx_engines.tokens import BundleTokenizer
from gsx_plugins.errors import UsageError

_LOG = logging.getLogger(__name__)
# Logits of a prompt that is scored are all in memory at once: a GiB of them.
MAX_PROMPT_LOGITS = 2**28
# Tokens of a prompt that are read between two steps of other requests: at most so many tokens long do these wait.
PIECE = 256
# The request that warms up: a call is recorded when its kind has been made twice, and then replayed.
_WARM_UP_PROMPT, _WARM_UP_TOKENS = 16, 4


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
        self._batch: list[Job] = []  # job n uses row n of the cache
        self._alone: list[Job] = []  # speculative jobs
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: LostGpuError | None = None

    @property
    def failure(self) -> LostGpuError | None:
        """Why no request can be carried out in this process any more; None while all is well."""
        return self._failure

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
            LostGpuError: the process has to end.
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
        prompt = Prompt()
        jobs = [
            Job(request, client, number, prompt, self._runner, self._tokenizer) for number, client in enumerate(clients)
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
                raise self._failure or ClosingError()
            if len(self._waiting) + len(jobs) > self.queue:
                raise OverloadedError(
                    "the server has more requests than it can handle",
                    expected=f"at most {self.slots} running and {self.queue} waiting",
                    found=f"{self.under_way} and {len(self._waiting)}",
                    todo="send the request again later",
                )
            self._waiting += jobs
            self._changed.notify()

    def warm_up(self) -> None:
        """Make the calls that requests make, so that the first request does not wait for what a runtime does once:
        memory and kernels of each size of call, recordings, the draft's engines. Before `run`.

        Raises:
            GsxError: the runtime cannot make these calls.
        """
        length = max(1, min(_WARM_UP_PROMPT, self.context - _WARM_UP_TOKENS))
        ids = [number % self._manifest.decoder.vocab_size for number in range(length)]
        request = Request(ids, min(_WARM_UP_TOKENS, self.context - length), stop_ids=frozenset())
        asked = [(request, number) for number in sorted({1, min(self.slots, max(1, self.queue))})]
        if self._draft is not None:
            asked.append((replace(request, speculative=True), 1))
        for one, number in asked:
            nobody = Nobody()
            self.submit(one, *[nobody] * number)
            while self.under_way or self.waiting:
                self.work()
            if nobody.error is not None:
                raise nobody.error

    def run(self, after_turn: Callable[[], None] = lambda: None) -> None:
        """Work until `close` is called or the GPU is lost (`failure`), in a thread of its own; after_turn is called
        after every turn. Unfinished requests fail."""
        try:
            self._run(after_turn)
        except LostGpuError as error:
            with self._changed:
                self._failure, self._closed = error, True
        for job in [*self._batch, *self._alone, *self._waiting]:
            inform(partial(job.client.failed, self._failure or ClosingError()))

    def _run(self, after_turn: Callable[[], None]) -> None:
        trimmer = Trimmer()
        while True:
            with self._changed:
                woken = self._changed.wait_for(lambda: self._closed or self._waiting or self.under_way, trimmer.wait)
                if self._closed:
                    return
            if woken:
                self.work()
                after_turn()
                trimmer.worked()
            trimmer.turn()

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
            inform(job.client.dropped)

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

    def _enter(self, job: Job) -> None:
        """Give a request its row, with what is there already of its prompt."""
        afresh = job.request.prompt_logprobs or self._source_of(job) is not None
        shared = self._cache_rows.enter(self._batch.index(job), job.sequence, job.controls, afresh=afresh)
        if job.prompt.logits is None:
            job.prompt.cached = shared

    def _source_of(self, job: Job) -> int | None:
        """The row of another continuation of the same request, if it has read the prompt."""
        rows = (row for row, one in enumerate(self._batch) if one.prompt is job.prompt and one is not job)
        return None if job.prompt.logits is None else next(rows, None)

    def _read_piece(self, job: Job) -> None:
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

    def _groups(self) -> list[list[Job]]:
        """The jobs of the batch, grouped by the steps that they may share.

        Jobs share a step if their run-time values for the whole call are equal. Under rank selection no jobs share one,
        since their tokens would compete with each other.
        """
        groups: dict[object, list[Job]] = {}
        for job in (job for job in self._batch if not job.reading):
            same = shared_by_batch(job.controls)
            groups.setdefault(id(job) if self._chooses_by_call else same, []).append(job)
        return list(groups.values())

    def _step(self, jobs: list[Job]) -> None:
        logits: dict[Job, np.ndarray | Likeliest] = {}

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

    def _round(self, job: Job) -> None:
        if job.decoding is None:
            assert self._draft is not None
            draft = draft_on(self._runner, self._draft)
            length = job.request.draft_length
            job.decoding = Decoding(self._runner, [job.sequence], job.controls, draft, length)
            job.decoding.start()
        else:
            job.decoding.round()

    def _rows(self, jobs: list[Job]) -> list[Continuation | None]:
        """The sequences of some jobs by their rows in the cache."""
        return [job.sequence if job in jobs else None for job in self._batch] + [None] * (
            self._cache.batch - len(self._batch)
        )

    def _controls(self, jobs: list[Job]) -> RuntimeValues:
        """The run-time values of a call for some jobs; values for each sequence are at the rows of the jobs."""
        rows = [job.controls if job in jobs else None for job in self._batch]
        return stacked([*rows, *[None] * (self._cache.batch - len(rows))])

    def _attempt(self, jobs: list[Job], work: Callable[[], object]) -> None:
        """Do the work of some jobs, and report to the clients of those that have tokens."""
        if self._works(jobs, work):
            self._leave([job for job in jobs if not job.reading and inform(job.report)])

    def _works(self, jobs: list[Job], work: Callable[[], object]) -> bool:
        """Do the work of some jobs; returns whether it succeeded. A failure affects only these jobs, unless nothing
        works any more."""
        try:
            work()
        except LostGpuError:
            _LOG.exception("the GPU is lost")
            raise
        except Exception as error:
            _LOG.exception("a step failed")
            for job in jobs:
                inform(partial(job.client.failed, error))
            self._leave(jobs, failed=True)
            return False
        return True

    def _leave(self, jobs: list[Job], *, failed: bool = False) -> None:
        """Free the slots of some jobs; the last row of the batch moves into each freed row."""
        for job in jobs:
            if job in self._alone:
                self._alone.remove(job)
                continue
            row, last = self._batch.index(job), len(self._batch) - 1
            self._cache_rows.leave(row, last, failed=failed)
            self._batch[row] = self._batch[last]
            self._batch.pop()
