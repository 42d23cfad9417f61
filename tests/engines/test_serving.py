"""The scheduler, in this process: its answers are those of `gsx generate`, whatever other requests are served."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gsx
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, controls_for
from gsx_engines.errors import EngineError
from gsx_engines.generation.continuation import Continuation
from gsx_engines.generation.decoding import Decoding
from gsx_engines.runners.base import Cache, Logits, Runner, StepOutput
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import Picker, Sampling, TokenLogprobs
from gsx_engines.serving.memory import Trimmer
from gsx_engines.serving.request import Finished, NewTokens, OverloadedError, Request
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.speculation.draft import open_draft_runner
from gsx_engines.tokens import BundleTokenizer
from gsx_plugins.errors import GsxError, UsageError

# Its thresholds are one table for all sequences.
OLD_BUNDLE = Path(__file__).parents[1] / "data" / "bundles-0.1.0" / "ffn-skip"


class Recorder:
    """A client that records what it receives."""

    def __init__(self, leaves_after: int | None = None) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.result: Finished | None = None
        self.error: Exception | None = None
        self.was_dropped = False
        self._leaves_after = leaves_after

    def tokens(self, new: NewTokens) -> None:
        assert self.result is None
        self.ids += new.ids
        self.text += new.text
        self.logprobs += new.logprobs

    def finished(self, result: Finished) -> None:
        self.result = result

    def failed(self, error: Exception) -> None:
        self.error = error

    def is_gone(self) -> bool:
        return self._leaves_after is not None and len(self.ids) >= self._leaves_after

    def dropped(self) -> None:
        self.was_dropped = True


class Counted:
    """A runner that counts its calls, and the tokens that it reads."""

    def __init__(self, runner: Runner) -> None:
        self.manifest, self._runner, self.read = runner.manifest, runner, 0
        self.calls, self.counts_tokens = 0, runner.counts_tokens
        self.new_cache, self.copy = runner.new_cache, runner.copy

    def step(self, cache: Cache, ids: np.ndarray, controls: RuntimeValues, *, counts: list[int], logits: Logits):
        self.calls += 1
        self.read += sum(counts)
        return self._runner.step(cache, ids, controls, counts=counts, logits=logits)


@pytest.fixture(scope="module")
def drafting(make_tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(make_tiny_bundle(draft="exit:2"))


@pytest.fixture(scope="module")
def scheduler(drafting: Bundle) -> Scheduler:
    """Four slots and a queue of 64, idle between tests."""
    assert drafting.manifest.draft is not None
    runner = open_draft_runner(drafting, drafting.manifest.draft.draft, 1)
    return Scheduler(runner, BundleTokenizer(drafting), slots=4)


@pytest.fixture(scope="module")
def alone(drafting: Bundle) -> Callable[[Request], gsx.generate]:
    """The tokens of a request by itself, from `gsx generate`; each request once."""
    made: dict[str, object] = {}

    def generate(request: Request) -> object:
        key = repr(request)
        if key not in made:
            how = request.sampling
            made[key] = gsx.generate(
                drafting,
                ids=request.prompt,
                budget=request.keep.budget,
                hold=request.keep.hold,
                max_new_tokens=request.max_new_tokens,
                temperature=how.temperature,
                top_k=how.top_k,
                seed=how.seed,
                stop=request.stop,
                speculative=False,
                threads=1,
            )
        return made[key]

    return generate


def finish(scheduler: Scheduler) -> None:
    while scheduler.waiting or scheduler.under_way:
        scheduler.work()


REQUESTS = [
    Request(
        prompt=[5 + n, 60, 61, 7 * n % 90 + 3][: 1 + n % 4],
        max_new_tokens=3 + 5 * n,
        keep=KeepSettings(budget=(None, 0.55, 1.0)[n % 3], hold=n in (4, 7, 8)),
        sampling=Sampling(1.2, 40, 1.0, n) if n % 2 else Sampling(),
        stop=("a", "\n") if n % 4 == 2 else (),
        speculative=n % 3 == 2,
    )
    for n in range(9)
]


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(0, len(REQUESTS) - 1), st.integers(0, 3)), min_size=1, max_size=12))
def test_every_request_gets_what_it_gets_alone(
    scheduler: Scheduler, alone: Callable, arrivals: list[tuple[int, int]]
) -> None:
    """Any requests, in any order, with any number of turns between them: tokens, text, finish, kept rows."""
    clients = []
    for number, turns in arrivals:
        clients.append((REQUESTS[number], Recorder()))
        scheduler.submit(*clients[-1])
        for _ in range(turns):
            scheduler.work()
    finish(scheduler)
    for request, client in clients:
        expected = alone(request)
        assert client.error is None
        assert client.result is not None
        assert (client.ids, client.text) == (expected.ids, expected.text)
        assert client.result.finish == expected.finish
        stats = client.result.stats
        assert (stats.prompt_tokens, stats.new_tokens) == (len(request.prompt), len(expected.ids))
        assert stats.held_share == expected.stats.held_share
        if not request.speculative:
            assert stats.kept_rows == expected.stats.kept_rows
            assert stats.gated_rows == expected.stats.gated_rows
            assert stats.decode_steps == len(expected.ids) - 1


def test_a_cancelled_request_is_dropped_and_changes_no_other(scheduler: Scheduler, alone: Callable) -> None:
    stays, leaves = REQUESTS[4], REQUESTS[8]
    clients = [Recorder(), Recorder(leaves_after=4), Recorder()]
    for request, client in zip((stays, leaves, stays), clients, strict=True):
        scheduler.submit(request, client)
    waiting = [Recorder(), Recorder(leaves_after=0)]
    scheduler.submit(REQUESTS[1], waiting[0])
    scheduler.submit(REQUESTS[0], Recorder())
    scheduler.submit(leaves, waiting[1])
    finish(scheduler)
    assert clients[1].was_dropped
    assert clients[1].result is None
    assert 4 <= len(clients[1].ids) < 10, "it was left within a round or two"
    assert waiting[1].was_dropped
    assert not waiting[1].ids
    for client in (clients[0], clients[2]):
        assert client.ids == alone(stays).ids
    assert waiting[0].ids == alone(REQUESTS[1]).ids


def test_other_families_are_served(family_bundle: Bundle) -> None:
    """Two requests together and one that comes later; each gets what it gets alone."""
    scheduler = Scheduler(open_runner(family_bundle, 1), BundleTokenizer(family_bundle), slots=2)
    clients = [(Request([5, 60, 61][:size], max_new_tokens=12), Recorder()) for size in (3, 1, 2)]
    for one in clients:
        scheduler.submit(*one)
    finish(scheduler)
    for request, client in clients:
        assert client.error is None
        expected = gsx.generate(family_bundle, ids=request.prompt, max_new_tokens=request.max_new_tokens, threads=1)
        assert client.ids == expected.ids


class Faulty:
    """A runner whose call fails when a certain token comes."""

    def __init__(self, runner: Runner, token: int) -> None:
        self.manifest, self._runner, self._token = runner.manifest, runner, token

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self._runner.new_cache(batch, capacity)

    def step(self, cache: Cache, input_ids: np.ndarray, controls: RuntimeValues, **options: Any) -> StepOutput:
        if (input_ids == self._token).any():
            raise RuntimeError("no such luck")
        return self._runner.step(cache, input_ids, controls, **options)

    def copy(self, cache: Cache, source: int, target: int, length: int) -> None:
        self._runner.copy(cache, source, target, length)


def test_a_request_that_fails_fails_alone(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    scheduler = Scheduler(Faulty(open_runner(bundle, 1), 250), BundleTokenizer(bundle), slots=3)
    clients = [Recorder() for _ in range(4)]
    for prompt, client in zip(([5, 6], [5, 250], [7, 8], [5, 6]), clients, strict=True):
        scheduler.submit(Request(prompt, 6), client)
    finish(scheduler)
    assert isinstance(clients[1].error, RuntimeError)
    assert all(client.error is None for client in (clients[0], clients[2], clients[3]))
    assert clients[0].ids == clients[3].ids == gsx.generate(bundle, ids=[5, 6], max_new_tokens=6).ids


class Poisoned(Faulty):
    """A runner that gives NaN for a sequence when a certain token comes."""

    def step(self, cache: Cache, input_ids: np.ndarray, controls: RuntimeValues, **options: Any) -> StepOutput:
        output = self._runner.step(cache, input_ids, controls, **options)
        logits = output.logits.copy()
        logits[(input_ids == self._token).any(axis=1)] = np.nan
        return replace(output, scores=logits)


def test_logits_that_are_no_numbers_fail_one_request(tiny_bundle: Path) -> None:
    """The other requests of the same step continue."""
    bundle = open_bundle(tiny_bundle)
    prompts = [5, 6], [7, 8], [9, 10, 11]
    wanted = [gsx.generate(bundle, ids=prompt, max_new_tokens=12).ids for prompt in prompts]
    elsewhere = {token for ids in (*prompts, wanted[0], wanted[2]) for token in ids}
    token = next(token for token in wanted[1] if token not in elsewhere)
    scheduler = Scheduler(Poisoned(open_runner(bundle, 1), token), slots=3)
    clients = [Recorder() for _ in prompts]
    for prompt, client in zip(prompts, clients, strict=True):
        scheduler.submit(Request(prompt, 12), client)
    finish(scheduler)
    assert isinstance(clients[1].error, EngineError)
    assert clients[1].ids == wanted[1][: wanted[1].index(token) + 1]
    assert [clients[0].ids, clients[2].ids] == [wanted[0], wanted[2]]


def test_a_client_that_cannot_be_reached_is_dropped(tiny_bundle: Path) -> None:
    class Broken(Recorder):
        def tokens(self, new: NewTokens) -> None:
            raise ConnectionError

    bundle = open_bundle(tiny_bundle)
    scheduler = Scheduler(open_runner(bundle, 1), slots=2)
    good = Recorder()
    scheduler.submit(Request([5, 6], 6), Broken())
    scheduler.submit(Request([5, 6], 6), good)
    finish(scheduler)
    assert good.ids == gsx.generate(bundle, ids=[5, 6], max_new_tokens=6).ids


def test_what_runs_portable_is_served_too(make_tiny_bundle: Callable[..., Path]) -> None:
    """Rank selection compares the tokens of a whole call, so its requests step one at a time; others share steps."""
    for options in ({"select": "rank", "calibration": None}, {}):
        bundle = open_bundle(make_tiny_bundle(**options))
        runner = WholeRunner(PortableStage(bundle, threads=1))
        scheduler = Scheduler(runner, slots=3)
        prompts = [[5, 60, 61], [7, 8], [9, 10, 11, 12], [13]]
        clients = [Recorder() for _ in prompts]
        for prompt, client in zip(prompts, clients, strict=True):
            scheduler.submit(Request(prompt, 5 + len(prompt)), client)
        finish(scheduler)
        for prompt, client in zip(prompts, clients, strict=True):
            assert client.ids == gsx.generate(bundle, ids=prompt, max_new_tokens=5 + len(prompt)).ids


OTHER_RULES = [
    (
        "layers",
        [
            KeepSettings(),
            KeepSettings(layers="0,2"),
            KeepSettings(layers="0.attn,1-2"),
            KeepSettings(exit=2),
            KeepSettings(speedup=1.5),
        ],
    ),
    (
        "calm:threshold=0.02",
        [
            KeepSettings(),
            KeepSettings(exit_threshold=0.0),
            KeepSettings(exit_threshold=1.0),
            KeepSettings(exit_threshold=0.0),
        ],
    ),
]


@pytest.mark.parametrize(("path", "calls"), [(None, 1), (OLD_BUNDLE, 3)])
def test_requests_of_different_budgets_share_their_steps(tiny_bundle: Path, path: Path | None, calls: int) -> None:
    """In bundles of 0.1.0 the budget is one for a whole call."""
    runner = Counted(open_runner(open_bundle(path or tiny_bundle), 1))
    scheduler = Scheduler(runner, slots=3)
    for budget in (None, 0.9, 1.0):
        scheduler.submit(Request([5, 60, 61], 12, keep=KeepSettings(budget=budget)), Recorder())
    while scheduler.waiting:
        scheduler.work()
    before = runner.calls
    scheduler.work()
    assert runner.calls - before == calls


@pytest.mark.parametrize(("policy", "keeps"), OTHER_RULES)
def test_what_other_rules_read_is_each_request_s_own(
    make_tiny_bundle: Callable[..., Path], policy: str, keeps: list[KeepSettings]
) -> None:
    bundle = open_bundle(make_tiny_bundle(policy=policy, budget=None, calibration=None))
    scheduler = Scheduler(open_runner(bundle, 1), slots=len(keeps))
    clients = [Recorder() for _ in keeps]
    for keep, client in zip(keeps, clients, strict=True):
        scheduler.submit(Request([5, 60, 61], 12, keep=keep), client)
    finish(scheduler)
    for keep, client in zip(keeps, clients, strict=True):
        alone = gsx.generate(
            bundle,
            ids=[5, 60, 61],
            max_new_tokens=12,
            layers=keep.layers,
            exit_layer=keep.exit,
            speedup=keep.speedup,
            exit_threshold=keep.exit_threshold,
            threads=1,
        )
        assert (client.error, client.ids) == (None, alone.ids)
    assert len({tuple(client.ids) for client in clients}) > 1, "what is asked matters"
    with pytest.raises(UsageError, match="no budget to choose"):
        scheduler.submit(Request([5], 3, keep=KeepSettings(budget=0.5)), Recorder())


def test_continuations_of_one_request_share_its_prompt(drafting: Bundle, scheduler: Scheduler) -> None:
    """Each is that of a batch of this prompt; the model reads the prompt once, and other requests notice nothing."""
    prompt, sampling = [5, 60, 61, 7, 8], Sampling(1.2, seed=7, presence_penalty=0.5)
    runner = scheduler._runner
    counted = Counted(runner)
    served = Scheduler(counted, BundleTokenizer(drafting), slots=3)
    clients, other = [Recorder() for _ in range(5)], Recorder()
    served.submit(Request([9, 10], 9), other)
    served.submit(Request(prompt, 12, sampling=sampling, logprobs=2), *clients)
    finish(served)
    for number, client in enumerate(clients):
        sequence = Continuation(drafting.manifest, prompt, 12, Picker(sampling), number, lambda token: False, None, 2)
        alone = Decoding(runner, [sequence], controls_for(drafting.manifest, prompt_tokens=[len(prompt)]))
        alone.start()
        while not alone.ended:
            alone.round()
        assert (client.ids, client.error) == (sequence.tokens, None)
        logprobs = [[one.logprob for one in found] for found in (client.logprobs, sequence.logprobs)]
        np.testing.assert_allclose(*logprobs, atol=1e-4)
        assert client.result is not None
        assert client.result.stats.kept_rows == alone.stats().kept_rows
    assert len({tuple(client.ids) for client in clients}) > 1
    assert other.ids == gsx.generate(drafting, ids=[9, 10], max_new_tokens=9, threads=1, speculative=False).ids
    assert counted.read == 2 + len(other.ids) - 1 + sum(len(client.ids) - 1 for client in clients) + len(prompt)


def test_more_continuations_than_may_wait_are_refused(tiny_bundle: Path) -> None:
    scheduler = Scheduler(open_runner(open_bundle(tiny_bundle), 1), slots=1, queue=3)
    with pytest.raises(UsageError, match="more continuations than may wait"):
        scheduler.submit(Request([5], 3), *(Recorder() for _ in range(4)))
    scheduler.submit(Request([5], 3), *(Recorder() for _ in range(2)))
    with pytest.raises(OverloadedError):
        scheduler.submit(Request([5], 3), *(Recorder() for _ in range(2)))
    assert scheduler.waiting == 2


def test_a_full_queue_refuses(tiny_bundle: Path) -> None:
    scheduler = Scheduler(open_runner(open_bundle(tiny_bundle), 1), slots=1, queue=2)
    for _ in range(2):
        scheduler.submit(Request([5], 3), Recorder())
    with pytest.raises(OverloadedError, match="more requests than it can handle") as refusal:
        scheduler.submit(Request([5], 3), Recorder())
    assert "again later" in refusal.value.message
    finish(scheduler)
    scheduler.submit(Request([5], 3), Recorder())


def test_a_prompt_whose_logits_do_not_fit_is_not_scored(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsx_engines.serving.scheduler.MAX_PROMPT_LOGITS", 3 * 260)
    scheduler = Scheduler(open_runner(open_bundle(tiny_bundle), 1), slots=1)
    scheduler.submit(Request([5, 6], 3, logprobs=0, prompt_logprobs=True), Recorder())
    with pytest.raises(UsageError, match="too long to be scored"):
        scheduler.submit(Request([5] * 9, 3, logprobs=0, prompt_logprobs=True), Recorder())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "empty"),
        (Request([5] * 40, 3), "longer than the context"),
        (Request([5], 40), "longer than the context"),
        (Request([5], 0), "the number of new tokens is out of range"),
        (Request([-5], 4), "outside the vocabulary"),
        (Request([5], 4, keep=KeepSettings(budget=1.5)), "budget"),
        (Request([5], 4, keep=KeepSettings(budget=float("nan"))), "budget"),
        (Request([5], 4, keep=KeepSettings(layers="0-1")), "reads a set of layers"),
        (Request([5], 4, keep=KeepSettings(exit_threshold=0.5)), "confidence-based exits"),
        (Request([5], 4, stop=("a",)), "tokenizer"),
        (Request([5], 4, speculative=True), "no draft"),
    ],
)
def test_bad_requests_are_refused(tiny_bundle: Path, request_: Request, message: str) -> None:
    scheduler = Scheduler(open_runner(open_bundle(tiny_bundle), 1), slots=1, context=32)
    with pytest.raises(UsageError, match=message):
        scheduler.submit(request_, Recorder())
    assert not scheduler.waiting


def test_the_thread_works_while_there_is_work_and_closes(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    scheduler = Scheduler(open_runner(bundle, 1), slots=2)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    done = threading.Event()

    class Waiting(Recorder):
        def finished(self, result: Finished) -> None:
            super().finished(result)
            done.set()

    client, cut = Waiting(), Recorder()
    scheduler.submit(Request([5, 6], 6), client)
    assert done.wait(60)
    assert client.ids == gsx.generate(bundle, ids=[5, 6], max_new_tokens=6).ids
    scheduler.submit(Request([5, 6], 400), cut)
    scheduler.close()
    thread.join(60)
    assert not thread.is_alive()
    assert cut.result is not None or isinstance(cut.error, GsxError)
    with pytest.raises(OverloadedError, match="shutting down"):
        scheduler.submit(Request([5], 3), Recorder())


def test_freed_memory_is_given_back() -> None:
    """Blocks between kept ones: the heap cannot shrink by itself."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("only glibc can: nothing to test with another C library")
    own, trimmer = psutil.Process(), Trimmer(seconds=0.0)
    blocks = [bytes(30_000) for _ in range(2000)]
    kept = blocks[::20]
    del blocks
    before = own.memory_info().rss
    assert not trimmer.turn(), "nothing has worked"
    trimmer.worked()
    assert trimmer.turn()
    assert trimmer.wait is None
    assert before - own.memory_info().rss > 20e6
    assert len(kept) == 100
    later = Trimmer(seconds=100.0)
    later.worked()
    assert not later.turn()
    assert later.wait == pytest.approx(100.0, abs=5.0)
