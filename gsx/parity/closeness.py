"""Comparing what an engine computed with what the reference computed: numbers, and keep/skip decisions.

A comparison is an object with all its statistics; whether it is good enough is decided in `report.py`. NaN
and infinity count as failures, and so does comparing nothing at all.

A decision that the two sides make differently changes everything that depends on it. Decisions are therefore
visited in the order in which the model makes them, and values that depend on an earlier difference (the later
positions of that sequence, from that branch on) are left out of the numbers and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gsx.parity.routes import Routes
from gsx.parity.store import Rows
from gsx_engines.bundle.words import BRANCHES

# Values that are compared at a time, in float64: a window's logits are the largest, and several arrays of them at once
# would be the largest thing in memory.
_BLOCK_VALUES = 250_000


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
class Place:
    """Where something was found: number of the window (or sequence), token; layer and branch if any."""

    window: int
    position: int
    layer: int | None = None
    branch: str | None = None

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"layer {self.layer}"]
        parts += [] if self.branch is None else [self.branch]
        return ", ".join([*parts, f"token {self.position} of window {self.window}"])


@dataclass(frozen=True)
class Comparison:
    """Statistics of the difference between two sides.

    Args:
        values: numbers compared; 0 is a failure.
        not_finite: pairs in which a value is NaN or infinite; any such pair is a failure.
        max_abs, mean_abs, rms: of the difference.
        reference_rms, reference_max: of the reference.
        max_relative: largest difference over its own scale, which is the larger of two root mean squares of the
            reference: of the token's vector, and of the whole tensor. So neither a token with huge states (as
            attention sinks have) nor one whose values nearly cancel is judged by a wrong scale.
        worst: where max_relative was.
    """

    values: int
    not_finite: int
    max_abs: float
    mean_abs: float
    rms: float
    reference_rms: float
    reference_max: float
    max_relative: float
    worst: Place | None

    @property
    def usable(self) -> bool:
        """Whether something was compared and all values were finite."""
        return self.values > 0 and self.not_finite == 0


@dataclass
class Accumulator:
    """Accumulates differences, call by call."""

    layer: int | None = None
    values: int = 0
    not_finite: int = 0
    max_abs: float = 0.0
    max_relative: float = 0.0
    reference_max: float = 0.0
    sum_abs: float = 0.0
    sum_squares: float = 0.0
    reference_squares: float = 0.0
    worst: Place | None = None

    def add(self, reference: Rows, found: Rows, clean: np.ndarray, window: int) -> None:
        """Compare the tokens that are clean.

        Args: reference, found [S, W]; clean [S] bool.
        Raises: ValueError if the two have different shapes: that is not a numerical difference.
        """
        if reference.shape != found.shape:
            raise ValueError(f"shapes differ: the reference has {reference.shape}, the engine {found.shape}")
        if not clean.any():
            return
        length, width = reference.shape
        step = max(1, _BLOCK_VALUES // width)
        # Of each token: the mean square of the reference, and the largest error.
        squares, largest = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    self._add_block(
                        reference[start : start + step], found[start : start + step], clean[start : start + step]
                    )
                    for start in range(0, length, step)
                ),
                strict=True,
            )
        )
        scale = np.sqrt(np.maximum(squares, squares.mean()))
        relative = largest / np.maximum(scale, np.finfo(np.float32).tiny)
        place = int(relative.argmax())
        if self.worst is None or relative[place] > self.max_relative:
            self.max_relative = float(relative[place])
            self.worst = Place(window, int(np.flatnonzero(clean)[place]), self.layer)

    def _add_block(self, reference: np.ndarray, found: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add some rows. Returns: of each clean one, the mean square of the reference, and the largest error."""
        want, have = (rows[clean].astype(np.float64) for rows in (reference, found))
        if not len(want):
            return np.zeros(0), np.zeros(0)
        error = np.subtract(have, want, out=have)
        np.abs(error, out=error)
        # What is not finite on either side is not finite in the difference: equal infinities give NaN.
        bad = ~np.isfinite(error)
        self.values += want.size
        if bad.any():
            self.not_finite += int(bad.sum())
            error[bad] = np.inf
            want[~np.isfinite(want)] = 0.0
        squares = np.einsum("sw,sw->s", want, want)
        largest = error.max(axis=1)
        self.max_abs = max(self.max_abs, float(largest.max()))
        self.reference_max = max(self.reference_max, float(want.max()), -float(want.min()))
        self.sum_abs += float(error.sum())
        self.sum_squares += float(np.einsum("sw,sw->", error, error))
        self.reference_squares += float(squares.sum())
        return squares / want.shape[1], largest

    def result(self) -> Comparison:
        """The result over everything that was added."""
        count = max(self.values, 1)
        return Comparison(
            values=self.values,
            not_finite=self.not_finite,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / count,
            rms=math.sqrt(self.sum_squares / count),
            reference_rms=math.sqrt(self.reference_squares / count),
            reference_max=self.reference_max,
            max_relative=self.max_relative,
            worst=self.worst,
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
                    self._states[layer].add(want.states[layer], have.states[layer], clean[i], first + i)
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
