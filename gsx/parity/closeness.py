"""Comparing what an engine computed with what the reference computed: numbers, and keep/skip decisions.

A decision that the two sides make differently changes everything that depends on it. Decisions are therefore
visited in the order in which the model makes them, and values that depend on an earlier difference (the later
positions of that sequence, from that branch on) are left out of the numbers and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gsx.parity.difference import Accumulator, Comparison, Place
from gsx.parity.routes import Routes
from gsx.parity.store import Rows
from gsx_engines.bundle.words import BRANCHES


@dataclass(frozen=True)
class Observation:
    """What one side computed for one sequence of S tokens, without padding. L: layers, W: any width.

    Args:
        logits: [S, V].
        states: L arrays [S, H], the output of every layer; empty, as keys and values, where only logits and decisions
            are compared.
        keys, values: of each cache [S, kv heads x head_dim], RoPE applied to keys.
        scores: [L, 2, S] float32; NaN where a branch has no gate.
        keep: [L, 2, S] bool; true where a branch has no gate.
        margins: of the reference, [L, 2, S]: how far a score is from where its decision would flip; inf where it
            cannot flip (end-of-text, no gate, budget 1).
        exit_logits: of the reference, [S, V] after the draft's exit layer; None if it was not asked for.
        routes: which experts the tokens went to.
    """

    logits: Rows
    states: Sequence[Rows]
    keys: Sequence[Rows]
    values: Sequence[Rows]
    scores: np.ndarray
    keep: np.ndarray
    margins: np.ndarray | None = None
    exit_logits: Rows | None = None
    routes: Routes = field(default_factory=Routes)

    @property
    def tokens(self) -> int:
        """S."""
        return len(self.logits)

    def head(self, count: int) -> Observation:
        """Only the first tokens."""
        return Observation(
            self.logits[:count],
            [x[:count] for x in self.states],
            [x[:count] for x in self.keys],
            [x[:count] for x in self.values],
            self.scores[..., :count],
            self.keep[..., :count],
            None if self.margins is None else self.margins[..., :count],
            routes=self.routes.head(count),
        )


@dataclass(frozen=True)
class Flip:
    """A decision that the two sides made differently, although nothing before it differed.

    Args:
        margin: distance of the reference's score from where the decision flips.
        near_tie: whether that is within the near-tie limit.
    """

    place: Place
    reference_keeps: bool
    margin: float
    near_tie: bool


@dataclass(frozen=True)
class Decisions:
    """Keep/skip decisions of both sides.

    Args:
        total: (token, gated branch) pairs.
        compared: pairs that do not depend on an earlier difference.
        differ: pairs that differ, including those that only follow from an earlier difference.
        near_ties: pairs whose margin in the reference is within the near-tie limit, flipped or not.
        flips: differences among the compared pairs.
        tokens: tokens of all windows; tokens_left_out: those that depend on a difference somewhere.
        reference_kept, engine_kept: pairs kept.
    """

    total: int
    compared: int
    differ: int
    near_ties: int
    flips: tuple[Flip, ...]
    tokens: int
    tokens_left_out: int
    reference_kept: int
    engine_kept: int

    @property
    def wrong(self) -> tuple[Flip, ...]:
        """Flips that are not near ties."""
        return tuple(flip for flip in self.flips if not flip.near_tie)

    @property
    def differing_share(self) -> float:
        """Share of all pairs that differ."""
        return self.differ / self.total if self.total else 0.0


@dataclass(frozen=True)
class Routing:
    """The choices of experts of both sides.

    Args:
        total: (token, routed layer) pairs.
        differ: pairs with other experts, including those that only follow from an earlier difference.
        flips: differences that do not depend on an earlier one.
        tokens, tokens_left_out: as in `Decisions`.
    """

    total: int
    differ: int
    flips: tuple[Flip, ...]
    tokens: int
    tokens_left_out: int

    @property
    def wrong(self) -> tuple[Flip, ...]:
        """Flips that are not near ties."""
        return tuple(flip for flip in self.flips if not flip.near_tie)


@dataclass(frozen=True)
class Compared:
    """One way of running the engine, compared with the reference: numbers per layer, and decisions.

    Args:
        states, keys, values: a comparison for each layer.
        scores: the same for each layer (both branches), None without gates.
        decisions: None without gates.
        routing: None without experts.
    """

    logits: Comparison
    states: tuple[Comparison, ...]
    keys: tuple[Comparison, ...]
    values: tuple[Comparison, ...]
    scores: tuple[Comparison, ...] | None
    decisions: Decisions | None
    routing: Routing | None


@dataclass
class _Walk:
    """Counts of decisions so far."""

    total: int = 0
    compared: int = 0
    differ: int = 0
    near_ties: int = 0
    flips: list[Flip] = field(default_factory=list)
    tokens: int = 0
    left_out: int = 0
    reference_kept: int = 0
    engine_kept: int = 0
    routed: int = 0
    routed_elsewhere: int = 0
    route_flips: list[Flip] = field(default_factory=list)


class Comparer:
    """Compares observations, call by call.

    Args:
        layers: L.
        branches: the branches with gates; empty for a dense model.
        causal: whether a decision depends only on a token's past (threshold selection). If not (rank), one difference
            affects every token of the call from there on.
        near_tie: margin up to which a decision may flip.
        near_route: the same of a choice of experts (`Routes`); None where numbers have no limit: then every choice may
            flip, and nothing is left out for it.
        copies: whether K and V depend on the decision of their own layer (K/V policy `copy`).
        caches: layer -> the number of the cache in which its K and V stay; None where each layer has its own.
    """

    def __init__(
        self,
        layers: int,
        branches: Sequence[str],
        *,
        causal: bool,
        near_tie: float,
        copies: bool,
        near_route: float | None = 0.0,
        caches: Mapping[int, int] | None = None,
    ) -> None:
        self._branches = [BRANCHES.index(branch) for branch in BRANCHES if branch in branches]
        self._causal, self._near_tie, self._near_route, self._copies = causal, near_tie, near_route, copies
        self._logits = Accumulator()
        self._states, self._scores = ([Accumulator(layer) for layer in range(layers)] for _ in range(2))
        self._caches = {layer: layer for layer in range(layers)} if caches is None else caches
        self._keys, self._values = ([Accumulator(cache) for cache in self._caches.values()] for _ in range(2))
        self._walk = _Walk()
        self._windows = 0

    def add(self, reference: Sequence[Observation], found: Sequence[Observation]) -> None:
        """Compare the sequences of one call."""
        assert len(reference) == len(found) > 0
        first = self._windows
        self._windows += len(reference)
        clean = [np.ones(observed.tokens, bool) for observed in reference]
        largest = [np.zeros(observed.tokens) for observed in reference]
        pairs = list(zip(reference, found, strict=True))
        for layer in range(len(self._states)):
            for column in (0, 1):
                if column == 0 and not self._copies:
                    self._add_kv(layer, pairs, clean, first)
                if column in self._branches:
                    self._decide(layer, column, pairs, clean, first)
                if column == 0 and self._copies:
                    self._add_kv(layer, pairs, clean, first)
            self._route(layer, pairs, clean, first)
            for i, (want, have) in enumerate(pairs):
                if want.states:
                    self._states[layer].add(want.states[layer], have.states[layer], clean[i], first + i, largest[i])
        for i, (want, have) in enumerate(pairs):
            self._logits.add(want.logits, have.logits, clean[i], first + i)
            self._walk.tokens += want.tokens
            self._walk.left_out += int((~clean[i]).sum())

    def result(self) -> Compared:
        """The result over everything that was added."""
        walk = self._walk
        decisions = Decisions(
            total=walk.total,
            compared=walk.compared,
            differ=walk.differ,
            near_ties=walk.near_ties,
            flips=tuple(walk.flips),
            tokens=walk.tokens,
            tokens_left_out=walk.left_out,
            reference_kept=walk.reference_kept,
            engine_kept=walk.engine_kept,
        )
        gated = bool(self._branches)
        return Compared(
            logits=self._logits.result(),
            states=tuple(layer.result() for layer in self._states),
            keys=tuple(layer.result() for layer in self._keys),
            values=tuple(layer.result() for layer in self._values),
            scores=tuple(layer.result() for layer in self._scores) if gated else None,
            decisions=decisions if gated else None,
            routing=Routing(walk.routed, walk.routed_elsewhere, tuple(walk.route_flips), walk.tokens, walk.left_out)
            if walk.routed
            else None,
        )

    def _add_kv(
        self, layer: int, pairs: list[tuple[Observation, Observation]], clean: list[np.ndarray], first: int
    ) -> None:
        cache = self._caches.get(layer)
        for i, (want, have) in enumerate(pairs):
            if want.keys and cache is not None:
                self._keys[cache].add(want.keys[cache], have.keys[cache], clean[i], first + i)
                self._values[cache].add(want.values[cache], have.values[cache], clean[i], first + i)

    def _decide(
        self,
        layer: int,
        column: int,
        pairs: list[tuple[Observation, Observation]],
        clean: list[np.ndarray],
        first: int,
    ) -> None:
        """Compare one branch's decisions, and mark the tokens that depend on a difference."""
        flipped = False
        for i, (want, have) in enumerate(pairs):
            keeps, found = want.keep[layer, column], have.keep[layer, column]
            assert want.margins is not None
            margins = want.margins[layer, column]
            walk = self._walk
            walk.total += keeps.size
            walk.differ += int((keeps != found).sum())
            walk.compared += int(clean[i].sum())
            walk.near_ties += int((margins <= self._near_tie).sum())
            walk.reference_kept += int(keeps.sum())
            walk.engine_kept += int(found.sum())
            score, other = want.scores[layer, column][:, None], have.scores[layer, column][:, None]
            # The engine's score of end-of-text is infinite, which means "always kept".
            decided_by_score = clean[i] & np.isfinite(score[:, 0]) & ~np.isposinf(other[:, 0])
            self._scores[layer].add(score, other, decided_by_score, first + i)
            differing = np.flatnonzero((keeps != found) & clean[i])
            for position in differing:
                margin = float(margins[position])
                place = Place(first + i, int(position), layer, BRANCHES[column])
                walk.flips.append(Flip(place, bool(keeps[position]), margin, margin <= self._near_tie))
            if len(differing):
                flipped = True
                clean[i][differing[0] :] = False
        self._leave_out_all(flipped, clean)

    def _route(
        self, layer: int, pairs: list[tuple[Observation, Observation]], clean: list[np.ndarray], first: int
    ) -> None:
        """Compare one layer's choices of experts, and mark the tokens that depend on a difference."""
        flipped = False
        for i, (want, have) in enumerate(pairs):
            if layer not in want.routes.chosen:
                continue
            margins = want.routes.margins[layer]
            differ = (want.routes.chosen[layer] != have.routes.chosen[layer]).any(axis=1)
            self._walk.routed += differ.size
            self._walk.routed_elsewhere += int(differ.sum())
            differing = np.flatnonzero(differ & clean[i])
            for position in differing:
                margin, limit = float(margins[position]), self._near_route
                place = Place(first + i, int(position), layer, "router")
                self._walk.route_flips.append(Flip(place, True, margin, limit is None or margin <= limit))
            if len(differing) and self._near_route is not None:
                flipped = True
                clean[i][differing[0] :] = False
        self._leave_out_all(flipped, clean)

    def _leave_out_all(self, flipped: bool, clean: list[np.ndarray]) -> None:
        """After a difference, where every decision depends on all tokens of the call, none is left."""
        if flipped and not self._causal:
            for mask in clean:
                mask[:] = False
