"""Sequences that are continued together, round by round.

A round reads the newest token of every sequence, drafts some more, and has the whole model choose a token after each of
them. Drafted tokens that agree with the model's choice are accepted; the first one that differs is replaced by the
model's own, and the rest is dropped. Without a draft, a round is a plain step. Only the model's choices decide, so the
text is the same either way (`gsx_engines/sampling.py`); a draft only saves time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.hold import with_thresholds
from gsx_engines.generation.continuation import Continuation
from gsx_engines.generation.reading import read, take
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.base import Cache, Runner, StepOutput
from gsx_engines.speculation.draft import Draft
from gsx_engines.speculation.length import FIRST_LENGTH, AdaptiveLength, DraftLength, FixedLength, Round

if TYPE_CHECKING:
    from gsx_engines.speculation.adapt import SkipSetSearch


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
