"""Improving a draft's set of skipped branches while it drafts: the search of SWIFT (arXiv:2410.06916).

From time to time, between two rounds, some neighbours of the current set read the last tokens again, each in one call;
then the model itself reads them. Comparing the choices of a set with the model's at each position shows how many
drafted tokens in a row would have been accepted there. Together with the bytes that a draft step reads this gives a
speed (`length.counted_speed`, also used by the search at export). A set that beats the current one on the same tokens
replaces it. If nothing better is found for a while, the search ends and costs nothing more.

The model reads last and so restores the cache, which is why the text does not depend on the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.cost import StepBytes
from gsx_engines.bundle.drafts import LayersDraft
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.runners.base import Cache
from gsx_engines.speculation.draft import FullDepthDraft, draft_controls
from gsx_engines.speculation.length import CHUNK, counted_speed

# The search reads the last WINDOW tokens again (32 to 50 in SWIFT), every EVERY rounds, with CANDIDATES sets at a time.
WINDOW, EVERY, CANDIDATES = 32, 8, 3
# It ends after PATIENCE attempts in a row that changed nothing, or MOST_LOOKS attempts in total.
PATIENCE, MOST_LOOKS = 4, 32
# A set must be better by this share, since the difference on one window is partly chance.
MARGIN = 0.02
# SWIFT's first set leaves out this share of the branches between the first layer and the last.
FIRST_SHARE = 0.45
# A candidate differs from the current set in one branch, with this probability in another one, and so on.
_ANOTHER = 0.5
_SEED = 0

Place = tuple[int, Branch]


@dataclass(frozen=True)
class Adaptation:
    """What a search has done so far.

    Args:
        looks: number of attempts.
        tried: number of sets tried, without the current one of each attempt.
        changes: how often another set replaced the current one.
        ended: whether the search has ended.
        speed: of the current set relative to plain decoding, on the tokens of the last attempt; None before the first.
    """

    looks: int = 0
    tried: int = 0
    changes: int = 0
    ended: bool = False
    speed: float | None = None


class SkipSetSearch:
    """Improves the set of branches that a draft leaves out.

    Args:
        draft: the draft; the search changes its set.
        cost: bytes of each branch.
    """

    def __init__(self, draft: FullDepthDraft, cost: StepBytes) -> None:
        assert isinstance(draft.kind, LayersDraft)
        self._draft, self._cost = draft, cost
        self._places = draft.runner.manifest.skippable_places
        self._rng = np.random.default_rng(_SEED)
        self._rounds = self._idle = 0
        self.found = Adaptation()

    def after_round(self, cache: Cache, texts: Sequence[Sequence[int]], controls: RuntimeValues) -> None:
        """Look for a better set, if it is time to.

        Args:
            cache: holds the texts except their newest tokens, before and after.
            texts: ids of each sequence, prompt and new tokens; empty if it has ended.
            controls: run-time values of the request.
        """
        self._rounds += 1
        if self.found.ended or self._rounds % EVERY:
            return
        lengths = list(cache.lengths)
        counts = [WINDOW if WINDOW <= length < len(text) else 0 for text, length in zip(texts, lengths, strict=True)]
        if not any(counts):
            return
        starts = [length - count for length, count in zip(lengths, counts, strict=True)]
        read = [row for row, count in enumerate(counts) if count]
        ids = np.zeros((len(counts), WINDOW), np.int64)
        for row in read:
            ids[row] = texts[row][starts[row] : lengths[row]]

        def choices(which: RuntimeValues) -> np.ndarray:
            cache.roll_back(starts)
            output = self._draft.runner.step(cache, ids, which, counts=counts, logits="all")
            return np.asarray(output.logits[read].argmax(axis=-1))

        own = self._draft.kind
        assert isinstance(own, LayersDraft)
        sets = [own, *self._neighbours(own)]
        guesses = [choices(draft_controls(one, self._draft.runner.manifest, controls)) for one in sets]
        wanted = choices(controls)  # last, so that the cache holds the model's own K and V again
        speeds = [self._speed(one, guess == wanted) for one, guess in zip(sets, guesses, strict=True)]
        best = int(np.argmax(speeds))
        changed = speeds[best] > speeds[0] * (1 + MARGIN)
        if changed:
            self._draft.change(sets[best])
        self._idle = 0 if changed else self._idle + 1
        looks = self.found.looks + 1
        self.found = Adaptation(
            looks=looks,
            tried=self.found.tried + len(sets) - 1,
            changes=self.found.changes + changed,
            ended=self._idle == PATIENCE or looks == MOST_LOOKS,
            speed=speeds[best if changed else 0],
        )

    def _neighbours(self, own: LayersDraft) -> list[LayersDraft]:
        """Distinct sets that differ in a few branches; each leaves out some branches, but not all."""
        found: dict[frozenset[Place], None] = {}
        for _ in range(8 * CANDIDATES):  # limited, since a set of few branches has few neighbours
            flips = min(self._rng.geometric(_ANOTHER), len(self._places))
            turned = {self._places[n] for n in self._rng.choice(len(self._places), flips, replace=False)}
            skip = frozenset(set(own.skip) ^ turned)
            if 0 < len(skip) < len(self._places):
                found[skip] = None
            if len(found) == CANDIDATES:
                break
        return [LayersDraft(skip=tuple(place for place in self._places if place in skip)) for skip in found]

    def _speed(self, draft: LayersDraft, right: np.ndarray) -> float:
        """Speed relative to plain decoding; right [B, WINDOW] bool: where the set's choice is the model's."""
        run = np.ones((self._draft.runner.manifest.decoder.num_layers, len(BRANCHES)), bool)
        for layer, branch in draft.skip:
            run[layer, BRANCHES.index(branch)] = False
        return counted_speed(in_a_row(right).ravel(), self._cost.share(run))[0]


def in_a_row(right: np.ndarray) -> np.ndarray:
    """How many drafted tokens would have been accepted from each position on, 0 to CHUNK.

    Args:
        right: [B, S] bool, where the draft's choice is the model's.
    Returns: [B, S - CHUNK + 1] int64.
    """
    chunks = np.lib.stride_tricks.sliding_window_view(right, CHUNK, axis=-1)
    return np.asarray(np.logical_and.accumulate(chunks, axis=-1).sum(axis=-1))


def first_set(manifest: Manifest) -> LayersDraft:
    """SWIFT's first set: a share of the branches between the first layer and the last, evenly spaced.

    A model without a layer between them begins with its last branch.
    """
    places = manifest.skippable_places
    last = manifest.decoder.num_layers - 1
    inner = [place for place in places if 0 < place[0] < last]
    return LayersDraft(skip=tuple(evenly(inner, FIRST_SHARE) or places[-1:]))


def evenly(places: Sequence[Place], share: float) -> list[Place]:
    """An evenly spaced share of places: one is selected whenever the running sum of shares passes a whole number."""
    steps = np.floor(np.arange(len(places) + 1) * share)
    return [place for place, step in zip(places, np.diff(steps), strict=True) if step]
