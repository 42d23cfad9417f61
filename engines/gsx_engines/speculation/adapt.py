"""A draft's set of skipped branches, bettered while it drafts: the search of SWIFT (arXiv:2410.06916).

Now and then, between two rounds, some neighbours of the set in use read the last tokens again, each in one call, and
the model itself reads them last. What the model would have chosen at each place, and what a set would have, tells how
many drafted tokens in a row would have stayed there; with the bytes that a draft step then reads that is a speed
(`length.counted_speed`, the measure of the search at export). A set that beats the one in use on the same tokens takes
its place. Where nothing better turned up for a while, the search ends and costs nothing more.

The model's own reading leaves the cache as it was, so the text does not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsx_engines.bundle.controls import Controls
from gsx_engines.bundle.cost import StepBytes
from gsx_engines.bundle.drafts import LayersDraft
from gsx_engines.bundle.fields import BRANCHES, Branch
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.runners.base import Cache
from gsx_engines.speculation.draft import OtherControls, draft_controls
from gsx_engines.speculation.length import CHUNK, counted_speed

# A search reads so many tokens back, as SWIFT does (32 to 50), every so many rounds; so many sets at a time.
WINDOW, EVERY, CANDIDATES = 32, 8, 3
# It ends after so many looks in a row that changed nothing, or so many at all.
PATIENCE, MOST_LOOKS = 4, 32
# A set must be better by this share: what separates two of them on one window is partly the window.
MARGIN = 0.02
# SWIFT's first set leaves out this share of the branches between the first layer and the last.
FIRST_SHARE = 0.45
# A candidate differs from the set in use in one branch, and in another one with this chance, and so on.
_ANOTHER = 0.5
_SEED = 0

Place = tuple[int, Branch]


@dataclass(frozen=True)
class Adaptation:
    """What a search has done up to now.

    Args:
        looks: times that sets were tried.
        tried: sets tried, beside the one in use.
        changes: times that another set took its place.
        ended: whether the search is over.
        speed: of the set in use over plain decoding, counted on the tokens of the last look; None before the first.
    """

    looks: int = 0
    tried: int = 0
    changes: int = 0
    ended: bool = False
    speed: float | None = None


class SkipSetSearch:
    """Betters the set of a draft.

    Args:
        draft: drafts without some branches; its set is changed.
        cost: bytes of each branch.
    """

    def __init__(self, draft: OtherControls, cost: StepBytes) -> None:
        assert isinstance(draft.kind, LayersDraft)
        self._draft, self._cost = draft, cost
        self._places = draft.runner.manifest.skippable_places
        self._rng = np.random.default_rng(_SEED)
        self._rounds = self._idle = 0
        self.found = Adaptation()

    def after_round(self, cache: Cache, texts: Sequence[Sequence[int]], controls: Controls) -> None:
        """Look for a better set where it is time to.

        Args:
            cache: holds the texts but for their newest tokens, and does so afterwards.
            texts: ids of each sequence, prompt and new tokens; empty where it has ended.
            controls: the request's.
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

        def choices(which: Controls) -> np.ndarray:
            cache.roll_back(starts)
            output = self._draft.runner.step(cache, ids, which, counts=counts, logits="all")
            return np.asarray(output.logits[read].argmax(axis=-1))

        own = self._draft.kind
        assert isinstance(own, LayersDraft)
        sets = [own, *self._neighbours(own)]
        guesses = [choices(draft_controls(one, self._draft.runner.manifest, controls)) for one in sets]
        wanted = choices(controls)  # the last one, so that the cache holds the model's own K and V again
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
        """Distinct sets that differ in a few branches, and leave something in and something out."""
        found: dict[frozenset[Place], None] = {}
        for _ in range(8 * CANDIDATES):  # a model of few branches has few neighbours
            flips = min(self._rng.geometric(_ANOTHER), len(self._places))
            turned = {self._places[n] for n in self._rng.choice(len(self._places), flips, replace=False)}
            skip = frozenset(set(own.skip) ^ turned)
            if 0 < len(skip) < len(self._places):
                found[skip] = None
            if len(found) == CANDIDATES:
                break
        return [LayersDraft(skip=tuple(place for place in self._places if place in skip)) for skip in found]

    def _speed(self, draft: LayersDraft, right: np.ndarray) -> float:
        """Over plain decoding: right [B, WINDOW] bool, where a set's choice is the model's."""
        run = np.ones((self._draft.runner.manifest.decoder.num_layers, len(BRANCHES)), bool)
        for layer, branch in draft.skip:
            run[layer, BRANCHES.index(branch)] = False
        return counted_speed(in_a_row(right).ravel(), self._cost.share(run))[0]


def in_a_row(right: np.ndarray) -> np.ndarray:
    """Drafted tokens that would have stayed from each place on: [B, S] bool -> [B, S - CHUNK + 1] int64, 0 to CHUNK."""
    chunks = np.lib.stride_tricks.sliding_window_view(right, CHUNK, axis=-1)
    return np.asarray(np.logical_and.accumulate(chunks, axis=-1).sum(axis=-1))


def first_set(manifest: Manifest) -> LayersDraft:
    """SWIFT's first set: a share of the branches between the first layer and the last, in even steps.

    A model without a layer between them begins with its last branch.
    """
    places = manifest.skippable_places
    last = manifest.decoder.num_layers - 1
    inner = [place for place in places if 0 < place[0] < last]
    return LayersDraft(skip=tuple(evenly(inner, FIRST_SHARE) or places[-1:]))


def evenly(places: Sequence[Place], share: float) -> list[Place]:
    """A share of places, in even steps: one is taken where the running sum of shares passes a whole number."""
    steps = np.floor(np.arange(len(places) + 1) * share)
    return [place for place, step in zip(places, np.diff(steps), strict=True) if step]
