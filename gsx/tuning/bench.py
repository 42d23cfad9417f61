"""How `gsx tune` measures: quality against the whole model, then time next to it; what is known already is taken over.

Quality is scored as `gsx compare` does it, and times are taken as `gsx bench` does it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from gsx.benchmarking.forms import Form, prompts_of
from gsx.benchmarking.machine import machine
from gsx.benchmarking.measure import Shape, time_forms
from gsx.benchmarking.rounds import Spread, ratios, spread
from gsx.comparison.measure import MeasuredBundle, Score, WholeModel, windows_in
from gsx.comparison.options import ExportOptions
from gsx.defaults import BENCH_ROUNDS
from gsx.parity.estimate import Estimate
from gsx.tuning.ledger import Ledger
from gsx.tuning.limit import Limit
from gsx.tuning.report import Times, TunePoint
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_plugins.progress import OnProgress, prefixed

# Over this many times the limit, the first part of the text is enough to drop a setting. Below it, what a little more
# loss would give is worth seeing.
_FAR, _FIRST_PART = 4.0, 0.25
# Shares of the time: for scoring a setting, and for timing the settings of a bundle; and what a timing takes at least.
_SCORING, _TIMING, _LEAST_TIMING = 0.04, 0.05, 5.0
_WHOLE = "whole model"
# A next token's rise of loss that is far for a limit that counts tokens.
_FAR_NATS = 0.5


@dataclass
class Bench:
    """Measures settings of bundles.

    Args:
        ledger: what is known.
        logits: of the whole model, on disk.
        windows: [M, S] int64, the text to score; of_text: its name in the ledger.
        prompts: text to take prompts from.
        limit: of the loss.
        prompt_tokens, new_tokens: of the answers to time.
        seconds: the whole time.
    """

    ledger: Ledger
    logits: WholeModel
    windows: np.ndarray
    of_text: str
    prompts: str
    limit: Limit
    prompt_tokens: int
    new_tokens: int
    seconds: float
    on_progress: OnProgress
    taken_over: int = 0
    _base: tuple[Bundle, KeepSettings] | None = None
    _loaded: MeasuredBundle | None = None
    _has_logits: bool = False
    _whole_times: Times | None = None
    _machine: str = field(default_factory=lambda: machine(("onnxruntime",)))

    def begin(self, bundle: Bundle, keep: KeepSettings) -> float:
        """Take a bundle at a setting as the whole model. Returns: seconds that scoring it takes."""
        self._base = bundle, keep
        known = self.ledger.get("quality", bundle.directory.name, self.of_text, "windows")
        if known is None or known["seconds"] < self.seconds:
            count = windows_in(_SCORING * self.seconds, bundle, self.windows, keep)
            known = {"seconds": self.seconds, "windows": max(count, known["windows"] if known else 0)}
            self.ledger.put(known, "quality", bundle.directory.name, self.of_text, "windows")
        self.windows = self.windows[: known["windows"]]
        began = time.monotonic()
        self._score(bundle, keep, len(self.windows), "")
        known_times = self.ledger.get("time", *self._of_times(bundle, keep, sure=False))
        self._whole_times = None if known_times is None else _times(known_times)
        return time.monotonic() - began

    def whole(self, options: ExportOptions) -> TunePoint:
        """The point of the whole model; its times are those that it had next to the others."""
        bundle, keep = self._known_base
        point = self.scored(bundle, options, keep, "", None)
        assert point is not None
        return replace(point, times=self._whole_times)

    def scored(
        self, bundle: Bundle, options: ExportOptions, keep: KeepSettings, setting: str, like: TunePoint | None
    ) -> TunePoint | None:
        """The quality of a setting; None if it is the whole model again.

        Args: like: a point that writes the same text.
        """
        weights = bundle.manifest.weights.size_bytes / 1e6
        if like is not None:
            return replace(like, options=options, keep=keep, setting=setting, weights_mb=weights, times=None)
        far = False
        first = max(1, math.ceil(len(self.windows) * _FIRST_PART))
        score = self._score(bundle, keep, first, setting)
        if self.limit.times(score.divergence, score.differing, surely=True) > _FAR:
            far = True
        elif first < len(self.windows):
            score = self._score(bundle, keep, len(self.windows), setting)
        rounds = options.scheme is not None
        base, base_keep = self._known_base
        again = (bundle.directory, keep) != (base.directory, base_keep)
        if again and score.kept == score.prompt_kept == 1 and not rounds:
            return None
        return TunePoint(
            options=options,
            keep=keep,
            setting=setting,
            prompt_kept=score.prompt_kept,
            kept=score.kept,
            divergence=score.divergence,
            differing=score.differing,
            verdict="lost early" if far else self.limit.verdict(score.divergence, score.differing),
            weights_mb=weights,
        )

    def timed(self, bundle: Bundle, points: Sequence[TunePoint]) -> list[TunePoint]:
        """Points of one bundle with their times, taken in turn with the whole model's."""
        known = {id(point): self._known_times(bundle, point, sure=False) for point in points}
        missing = [point for point in points if known[id(point)] is None]
        if missing:
            found = self._time(bundle, missing, max(_LEAST_TIMING, _TIMING * self.seconds), sure=False)
            known |= {id(point): times for point, times in zip(missing, found, strict=True)}
        return [replace(point, times=known[id(point)]) for point in points]

    def timed_surely(self, bundle: Bundle, point: TunePoint) -> TunePoint:
        """A point with times of all rounds, however long they take.

        They are kept apart from the first ones: by those a second run chooses what to try, and it shall try the same.
        """
        known = self._known_times(bundle, point, sure=True)
        if known is None:
            (known,) = self._time(bundle, [point], math.inf, sure=True)
        return replace(point, times=known)

    def is_far(self, nats: float) -> bool:
        """Whether a rise of the loss is so far over the limit that no more than this need be tried."""
        return nats > (_FAR_NATS if self.limit.divergence is None else _FAR * self.limit.divergence)

    def export_seconds(self, bundle: Bundle) -> float | None:
        """How long an export took, in an earlier run too; None if it is not known."""
        found: float | None = self.ledger.get("export", bundle.directory.name)
        return found

    def note_export(self, bundle: Bundle, seconds: float) -> None:
        """Keep how long an export took."""
        self.ledger.put(seconds, "export", bundle.directory.name)

    def exports_of(self, kind: str) -> float | None:
        """How many plain exports the last one of a kind took, in an earlier run too; None if there was none."""
        found: float | None = self.ledger.get("export of a kind", kind)
        return found

    def note_export_of(self, kind: str, plain_ones: float) -> None:
        """Keep how many plain exports one of a kind took."""
        self.ledger.put(plain_ones, "export of a kind", kind)

    def kept_sets(self) -> list[list[int]] | None:
        """Sets of layers that an earlier run found."""
        found: list[list[int]] | None = self.ledger.get("sets", *self._of_sets)
        return found

    def keep_sets(self, sets: list[list[int]]) -> None:
        """Keep sets of layers."""
        self.ledger.put(sets, "sets", *self._of_sets)

    @property
    def _of_sets(self) -> tuple[object, ...]:
        return self._known_base[0].directory.name, self.of_text, self.limit

    @property
    def _known_base(self) -> tuple[Bundle, KeepSettings]:
        assert self._base is not None, "begin() comes first"
        return self._base

    def _score(self, bundle: Bundle, keep: KeepSettings, count: int, setting: str) -> Score:
        """The score on the first windows, as many as asked for or more."""
        base, base_keep = self._known_base
        key = (bundle.directory.name, keep, self.of_text, base.directory.name)
        known = self.ledger.get("quality", *key)
        if known is not None and known["windows"] >= count:
            self.taken_over += 1
            return _score_of(known["score"])
        title = " ".join(part for part in (bundle.directory.name.rpartition("-")[0], setting) if part)
        score = None
        if not self._has_logits:
            found = self._open(base).score(base_keep, self.logits, on_progress=prefixed(self.on_progress, _WHOLE))
            self._has_logits = True
            score = found if (bundle.directory, keep) == (base.directory, base_keep) else None
        if score is None:
            shown = prefixed(self.on_progress, title)
            score = self._open(bundle).score(keep, self.logits, slice(count), on_progress=shown)
        self.ledger.put({"windows": count, "score": asdict(score)}, "quality", *key)
        return score

    def _open(self, bundle: Bundle) -> MeasuredBundle:
        if self._loaded is None or self._loaded.bundle.directory != bundle.directory:
            self._loaded = None
            self._loaded = MeasuredBundle(bundle, self.windows)
        return self._loaded

    def _known_times(self, bundle: Bundle, point: TunePoint, *, sure: bool) -> Times | None:
        found = self.ledger.get("time", *self._of_times(bundle, point.keep, sure))
        self.taken_over += found is not None
        return None if found is None else _times(found)

    def _of_times(self, bundle: Bundle, keep: KeepSettings, sure: bool) -> tuple[object, ...]:
        base = self._known_base[0].directory.name
        rounds = "all rounds" if sure else "some rounds"
        return bundle.directory.name, keep, base, self.prompt_tokens, self.new_tokens, self._machine, rounds

    def _time(self, bundle: Bundle, points: Sequence[TunePoint], seconds: float, *, sure: bool) -> list[Times]:
        """Time points of one bundle, and keep the result. Args: seconds: when to stop; sure: as what to keep them."""
        self._loaded = None  # no more than two bundles in memory
        base, base_keep = self._known_base
        draft = None if bundle.manifest.draft is None else str(bundle.manifest.draft.draft)
        forms = [Form(_WHOLE, 0, base_keep)]
        forms += [Form(f"{point.name} {number}", 1, point.keep, draft) for number, point in enumerate(points)]
        shape = Shape(1, self.prompt_tokens)
        bundles = [base, bundle]
        prompts = {shape: [prompts_of(one, self.prompts, 1, self.prompt_tokens) for one in bundles]}
        found = time_forms(
            forms,
            prompts,
            [{"bundle": one.directory.resolve()} for one in bundles],
            new_tokens=self.new_tokens,
            rounds=BENCH_ROUNDS,
            seconds=seconds,
            on_progress=prefixed(self.on_progress, bundle.directory.name.rpartition("-")[0]),
        )[shape]
        self._whole_times, *result = (self._times_of(found[form.name], found[_WHOLE]) for form in forms)
        self.ledger.put(asdict(self._whole_times), "time", *self._of_times(base, base_keep, sure=False))
        for point, times in zip(points, result, strict=True):
            self.ledger.put(asdict(times), "time", *self._of_times(bundle, point.keep, sure))
        return result

    def _times_of(self, answers: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]) -> Times:
        """The times of answers, one of each round. Args: whole: the whole model's."""

        def seconds(one: Mapping[str, Any]) -> float:
            return float(one["first"] + one["token"] * (self.new_tokens - 1))

        return Times(
            first_ms=1000 * spread([one["first"] for one in answers]).median,
            token_ms=1000 * spread([one["token"] for one in answers]).median,
            ratio=ratios([seconds(one) for one in answers], [seconds(one) for one in whole]),
            rounds=len(answers),
            peak_mb=answers[-1]["peak_mb"],
        )


def _score_of(values: dict[str, Any]) -> Score:
    estimates = {name: Estimate(**values[name]) for name in ("divergence", "differing")}
    return Score(**{**values, **estimates})


def _times(values: dict[str, Any]) -> Times:
    return Times(**{**values, "ratio": Spread(**values["ratio"])})
