"""The decoding loop, written once over the runner interface: plain, or with a draft that the model verifies.

A round reads the newest token of every sequence, drafts some more, and has the whole model choose a token after each of
them. Drafted tokens that agree with the model's choice are accepted; the first one that differs is replaced by the
model's own, and the rest is dropped. Without a draft, a round is a plain step. Only the model's choices decide, so the
text is the same either way (`gsx_engines/sampling.py`); a draft only saves time.

`Decoding` is the loop for sequences that begin together. Where sequences come and go (`gsx_engines/serving`), a
scheduler puts `Continuation`s into the rows of one cache, and calls `read` and `take` itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, RuntimeValues, controls_for
from gsx_engines.bundle.hold import Hold, hold_of, with_thresholds
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.likeliest import Likeliest, all_of
from gsx_engines.runners.base import Cache, Logits, Runner, StepOutput
from gsx_engines.sampling import GREEDY, Picker, Sampling, TokenLogprobs, adjusted, check_logprobs, logprobs_of
from gsx_engines.speculation.draft import Draft
from gsx_engines.speculation.length import FIRST_LENGTH, AdaptiveLength, DraftLength, FixedLength, Round
from gsx_plugins.errors import UsageError

if TYPE_CHECKING:
    from gsx_engines.speculation.adapt import SkipSetSearch

FinishReason = Literal["end-of-text", "length", "context", "stopped"]
# Called with (sequence, token); returning True ends the sequence.
OnToken = Callable[[int, int], bool]


@dataclass(frozen=True)
class GenerationStats:
    """Counters of one `generate` call.

    Args:
        prompt_tokens, new_tokens: over all sequences.
        sequences: how many there are.
        prefill_seconds: time of the first call, until the first tokens are chosen.
        decode_seconds: time of all later rounds.
        decode_steps: number of later rounds; each has one verification or one plain step.
        draft_seconds, verify_seconds, search_seconds: parts of decode_seconds: in draft steps, in verifications and
            plain steps, and in the search for a better draft. The rest is spent in the loop itself.
        drafted, accepted: by position in the draft, from its first token on: how often a token was drafted there after
            only correct ones, and how often it was correct itself.
        draft_rounds: of each verification of a sequence's draft, the number of drafted tokens and of those accepted.
        kept_rows, gated_rows: rows that skippable branches ran on, and rows that the keep rule decided on, in all
            layers that the model itself ran; 0 for a dense model.
        held_kept_rows, held_gated_rows: the same of the new tokens alone whose budget was held; drafted tokens that
            were wrong do not count.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    sequences: int = 1
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    search_seconds: float = 0.0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    draft_rounds: tuple[tuple[int, int], ...] = ()
    kept_rows: int = 0
    gated_rows: int = 0
    held_kept_rows: int = 0
    held_gated_rows: int = 0

    @property
    def kept_share(self) -> float | None:
        """Share of (token, branch) pairs kept; None for a dense model."""
        return self.kept_rows / self.gated_rows if self.gated_rows else None

    @property
    def held_share(self) -> float | None:
        """Share of (token, branch) pairs that new tokens kept; None where no budget was held."""
        return self.held_kept_rows / self.held_gated_rows if self.held_gated_rows else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens after the first of each sequence, divided by the time that they took."""
        return (self.new_tokens - self.sequences) / self.decode_seconds if self.decode_seconds else None

    @property
    def tokens_per_verification(self) -> float | None:
        """New tokens of a sequence per round; above 1 if drafts were accepted."""
        return (self.new_tokens - self.sequences) / self.sequences / self.decode_steps if self.decode_steps else None

    @property
    def acceptance(self) -> float | None:
        """Probability that a drafted token is correct, given that those before it are; None if nothing was drafted."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else None


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


Rows = Sequence[Continuation | None]


def read(runner: Runner, cache: Cache, rows: Rows, controls: RuntimeValues, logits: Logits = "last") -> StepOutput:
    """Have the model read the unread tokens of each sequence; `take` then chooses their next tokens.

    Args:
        runner: the model.
        cache: its cache.
        rows: the sequences by their rows in the cache; None, and sequences that have ended, are left out.
        controls: as in `Call`, for all rows.
        logits: as in `Runner.step`.
    """
    unread = [sequence.unread if sequence is not None and sequence.left else () for sequence in rows]
    return read_tokens(runner, cache, unread, controls, logits)


def read_tokens(
    runner: Runner, cache: Cache, unread: Sequence[Sequence[int]], controls: RuntimeValues, logits: Logits
) -> StepOutput:
    """Have the model read some tokens of each row; the rest is as for `read`."""
    counts = list(map(len, unread))
    ids = np.zeros((len(counts), max(counts)), np.int64)
    for row, tokens in enumerate(unread):
        ids[row, : len(tokens)] = tokens
    return runner.step(cache, ids, controls, counts=counts, logits=logits)


def take(rows: Rows, output: StepOutput) -> None:
    """Choose the next token of every sequence that has not ended; output: of `read` with the same rows."""
    for row, sequence in enumerate(rows):
        if sequence is not None and sequence.left:
            sequence.take(output.behind(row, 0))


@dataclass
class _Counters:
    kept: int = 0
    gated: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    search_seconds: float = 0.0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def add(self, output: StepOutput) -> None:
        """Count the kept rows of a call that the model itself would have made too."""
        if output.kept is not None:
            self.kept += int(output.kept.sum())
            self.gated += output.gated_rows

    def count_draft(self, drafted: int, accepted: int) -> None:
        """Count the draft of one sequence in one round."""
        for counts, number in ((self.drafted, drafted), (self.accepted, accepted)):
            counts += [0] * (number - len(counts))
            for place in range(number):
                counts[place] += 1


class Decoding:
    """Sequences that are continued together, round by round.

    Args:
        runner: the model; with a draft, the draft's own runner.
        sequences: what to continue; sequence n uses row n of the cache.
        controls: as in `Call`.
        draft: guesses tokens ahead; None for plain decoding.
        draft_length: tokens drafted at once, 0 for plain decoding; None to find it while generating.
        search: improves the draft's set of branches between rounds.
    """

    def __init__(
        self,
        runner: Runner,
        sequences: Sequence[Continuation],
        controls: RuntimeValues,
        draft: Draft | None = None,
        draft_length: int | None = None,
        search: SkipSetSearch | None = None,
    ) -> None:
        assert draft is None or draft.runner is runner, "a draft needs the cache of its own runner"
        self.runner, self.sequences, self.controls, self.draft = runner, sequences, controls, draft
        self.search = search
        self.length: DraftLength = FixedLength(draft_length or 0)
        if draft is not None and draft_length is None:
            own = runner.manifest.draft
            self.length = AdaptiveLength((own.length if own and own.draft == draft.kind else None) or FIRST_LENGTH)
        self.counters = _Counters()
        self._cache = runner.new_cache(len(sequences), max(sequence.capacity for sequence in sequences))
        self._prefill_seconds = self._decode_seconds = 0.0
        self._rounds = 0

    @property
    def ended(self) -> bool:
        """Whether all sequences have ended."""
        return not any(sequence.left for sequence in self.sequences)

    def start(self) -> None:
        """Read the prompts and choose the first tokens."""
        began = time.perf_counter()
        output = read(self.runner, self._cache, self.sequences, self.controls)
        self.counters.add(output)
        take(self.sequences, output)
        self._prefill_seconds = time.perf_counter() - began

    def round(self) -> None:
        """Give at least one token to every sequence that has not ended."""
        began = time.perf_counter()
        wanted = self.length.next() if self.draft is not None else 0
        # No more than some sequence can still use.
        size = min(wanted, max(s.most_drafts for s in self.sequences))
        if size and self.draft is not None:
            self._speculate(self._cache, self.draft, size)
        else:
            self._plain_step(self._cache)
        self._rounds += 1
        if self.search is not None:
            self._search(self.search)
        self._decode_seconds += time.perf_counter() - began

    def stats(self) -> GenerationStats:
        """The counters so far."""
        counters, sequences = self.counters, self.sequences
        return GenerationStats(
            prompt_tokens=sum(len(s.prompt) for s in sequences),
            new_tokens=sum(len(s.tokens) for s in sequences),
            sequences=len(sequences),
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            decode_steps=self._rounds,
            draft_seconds=counters.draft_seconds,
            verify_seconds=counters.verify_seconds,
            search_seconds=counters.search_seconds,
            drafted=tuple(counters.drafted),
            accepted=tuple(counters.accepted + [0] * (len(counters.drafted) - len(counters.accepted))),
            draft_rounds=tuple(counters.rounds),
            kept_rows=counters.kept,
            gated_rows=counters.gated,
            held_kept_rows=sum(s.hold.kept for s in sequences if s.hold is not None),
            held_gated_rows=sum(s.hold.gated for s in sequences if s.hold is not None),
        )

    def _hold(self, output: StepOutput, read: Sequence[int]) -> None:
        """Count what the new tokens of a call kept, and set the thresholds of the next ones.

        Args:
            output: of the call.
            read: for each sequence, how many of its tokens stay.
        """
        holds = [sequence.hold for sequence in self.sequences]
        changed = False
        for row, hold in enumerate(holds):
            for token in range(read[row] if hold is not None else 0):
                assert hold is not None
                assert output.kept_by_token is not None
                changed |= hold.read(int(output.kept_by_token[row, token]))
        if changed:
            self.controls = with_thresholds(self.controls, holds)

    def _search(self, search: SkipSetSearch) -> None:
        began = time.perf_counter()
        texts = [[*s.prompt, *s.tokens] if s.left else () for s in self.sequences]
        search.after_round(self._cache, texts, self.controls)
        self.counters.search_seconds += time.perf_counter() - began

    def _plain_step(self, cache: Cache) -> None:
        began = time.perf_counter()
        output = read(self.runner, cache, self.sequences, self.controls)
        seconds = time.perf_counter() - began
        self.counters.verify_seconds += seconds
        self.counters.add(output)
        self.length.learn(Round(0, 1.0, 0, 0, 0.0, 0.0, seconds))
        self._hold(output, [int(sequence.left > 0) for sequence in self.sequences])
        take(self.sequences, output)

    def _speculate(self, cache: Cache, draft: Draft, size: int) -> None:
        """One round: draft up to `size` tokens of every sequence, verify them, and keep those that are correct."""
        start = cache.lengths
        ids = np.zeros((len(self.sequences), size + 1), np.int64)
        ids[:, 0] = [sequence.tokens[-1] for sequence in self.sequences]
        confidences, draft_seconds = self._draft(cache, draft, ids)
        drafts = [len(row) for row in confidences]
        longest = max(drafts)
        began = time.perf_counter()
        counts = [count + 1 if s.left else 0 for count, s in zip(drafts, self.sequences, strict=True)]
        output = draft.verify(cache, start, ids[:, : longest + 1], self.controls, counts)
        verify_seconds = time.perf_counter() - began
        self.counters.add(output)
        alive = sum(count > 0 for count in counts)
        tokens = right = wrong = 0
        confidence = 0.0
        stays = list(start)
        for row, sequence in enumerate(self.sequences):
            if not sequence.left:
                continue
            count, proposed = 0, drafts[row]
            while True:
                token = sequence.take(output.behind(row, count))
                if not sequence.left or count == proposed or token != ids[row, count + 1]:
                    break
                count += 1
            # Tokens drafted after a wrong one, or after the end of a sequence, count neither as right nor as wrong.
            missed = count < proposed and token != ids[row, count + 1]
            hit = count + (count < proposed and not missed)
            judged = hit + missed
            right, wrong = right + hit, wrong + missed
            confidence += sum(confidences[row][:judged])
            self.counters.count_draft(judged, hit)
            if proposed:
                self.counters.rounds.append((proposed, hit))
            tokens += count + 1
            stays[row] += count + 1
        cache.roll_back(stays)
        self._hold(output, [after - before for after, before in zip(stays, start, strict=True)])
        self.counters.draft_seconds += draft_seconds
        self.counters.verify_seconds += verify_seconds
        self.length.learn(Round(longest, tokens / alive, right, wrong, confidence, draft_seconds, verify_seconds))

    def _draft(self, cache: Cache, draft: Draft, ids: np.ndarray) -> tuple[list[list[float]], float]:
        """Fill ids [B, 1 + size], whose first column holds the newest tokens, with drafted ones.

        Returns: for each sequence the draft's confidence in each drafted token; the time of the draft steps in seconds.
        """
        confidences: list[list[float]] = [[] for _ in self.sequences]
        # Sequences near their limit, or a change of their thresholds, draft fewer tokens.
        going = [s.most_drafts > 0 for s in self.sequences]
        together = [1.0] * len(going)
        seconds = 0.0
        for step in range(ids.shape[1] - 1):
            began = time.perf_counter()
            guess = draft.step(cache, ids[:, step : step + 1], self.controls, list(map(int, going)))
            seconds += time.perf_counter() - began
            self.counters.add(guess)
            for row, sequence in enumerate(self.sequences):
                if not going[row]:
                    continue
                token, confidence = sequence.guess(guess.behind(row, 0), ids[row, 1 : step + 1].tolist())
                ids[row, step + 1] = token
                confidences[row].append(confidence)
                together[row] *= confidences[row][-1]
                going[row] = step + 1 < sequence.most_drafts and self.length.goes_on(step + 1, together[row])
            if not any(going):
                break
        return confidences, seconds


def check_draft_length(length: int | None, manifest: Manifest) -> None:
    """Refuse a number of drafted tokens that no round can have."""
    if length is not None and not 0 <= length <= manifest.decoder.max_positions:
        raise UsageError(
            "the draft length is out of range",
            expected=f"0 (plain decoding) to {manifest.decoder.max_positions}",
            found=str(length),
        )


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
