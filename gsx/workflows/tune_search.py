"""What `gsx tune` tries, in which order, and how it is measured.

What costs least is tried first: an export that is already in the work folder, then plain ones, then those that
calibrate or choose codes. What holds alone is then tried together, and the best form with a draft.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from gsx.comparison.options import ExportOptions
from gsx.tuning.bench import Bench
from gsx.tuning.report import TunePoint
from gsx.workflows.fitting import Fitting
from gsx.workflows.kept_exports import KeptExports
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings
from gsx_engines.bundle.drafts import places_text
from gsx_engines.bundle.manifest import SchemeName
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.layer_study import least_harm
from gsx_exporter.rules.layers.policy import LAYERS
from gsx_exporter.text import TokenText
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import OnProgress, in_words

# What an export takes, in plain exports, as long as none of its kind was made in this work folder: where only weights
# are in 8 bits; where codes are chosen on text; where thresholds are calibrated; where a draft is searched. Orders of
# magnitude, seen in work folders of SmolLM2 and small models (weights in 8 bits: 2.5 to 18 plain exports on a busy
# machine); a guess that is too low makes a run longer, one that is too high tries less.
_SCHEMES: dict[SchemeName | None, float] = {None: 1, "int8-weights": 3, "int8": 12, "int4": 12}
_CALIBRATING, _SEARCHING = 10, 15
# Of the time, for finding the layers that do least harm; and how many such sets are tried.
_SETS_SHARE, _MOST_SETS = 0.1, 6
# Sets are found on so many tokens: only their order matters, and all are then scored.
_SETS_TOKENS = 1024

# Settings of a policy that are measured in full, for planning: the others are lost early.
_USUAL_SETTINGS = 3
# How many of the fastest that hold are timed again, with all rounds.
_FINALISTS = 3

# Curve -> name of a setting -> keep settings, from the one that keeps most to the one that keeps least.
Settings = Mapping[str, Mapping[str, KeepSettings]]


@dataclass(frozen=True)
class Job:
    """A bundle to try.

    Args:
        options: what it is exported with.
        settings: to try; None for those of the policy's curves.
        like: the point whose text it writes, only faster: it drafts for it.
        sure: whether it is timed with all rounds.
    """

    options: ExportOptions
    settings: Settings | None = None
    like: TunePoint | None = None
    sure: bool = False


@dataclass
class Search:
    """The search.

    Args:
        exports: the bundles. fit: the policies. bench: measures.
        sets_text: to find sets of layers on.
        ends: on the monotonic clock, when nothing more is begun. seconds: the whole time.
    """

    checkpoint: Checkpoint
    exports: KeptExports
    fit: Fitting
    bench: Bench
    sets_text: TokenText
    ends: float
    seconds: float
    on_progress: OnProgress
    points: list[TunePoint] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    _seen: set[ExportOptions] = field(default_factory=set)
    _unit: float = 0.0
    _measuring: float = 0.0

    def run(self) -> None:
        """Try everything that the time allows.

        Raises:
            GsxError: the whole model cannot be exported, or the time is too short for anything beside it.
        """
        self.left_out |= self.fit.refused
        base = ExportOptions(self.fit.whole)
        began = time.monotonic()
        bundle = self._export(base)
        self._unit = self.bench.export_seconds(bundle) or time.monotonic() - began
        self._measuring = self.bench.begin(bundle, self.fit.keep_all)
        self.points.append(self.bench.whole(base))  # its times follow with those of the others
        queue = list(self._singles())
        while queue:
            job = min(queue, key=lambda one: self._cost(one.options))
            queue.remove(job)
            self._maybe(job)
            queue += self._combinations()
        self._time_again()
        self._time_nearest()
        best = self.best()
        if best is not None:
            for draft in self._drafts(self.points[best]):
                self._maybe(draft)
        if len(self.points) == 1:
            self._refuse_time()

    def settle(self) -> int | None:
        """The index of the fastest point that holds, as a bundle that does so by default."""
        best = self._settled()
        self.points[0] = self.bench.whole(self.points[0].options)  # with its times next to the last ones
        return best

    def _settled(self) -> int | None:
        while (best := self.best()) is not None:
            point = self.points[best]
            options = point.options.by_default(point.keep)
            if options == point.options:
                point = self.bench.timed_surely(self.exports.bundle(options), point)
                self.points[best] = replace(point, keep=AS_EXPORTED)  # which asks for the same
                if self.best() == best:
                    return best
                continue
            self.points.remove(point)
            self._seen.add(options)
            self._try(Job(options, {"": {point.setting: AS_EXPORTED}}, sure=True))
        return None

    def _time_again(self) -> None:
        """Time the fastest that hold with all rounds: what seemed fast in one round may be chance."""
        sure: set[int] = set()
        for _ in range(_FINALISTS):
            best = self.best()
            if best is None or best in sure:
                return
            sure.add(best)
            point = self.points[best]
            self.points[best] = self.bench.timed_surely(self.exports.bundle(point.options), point)

    def _time_nearest(self) -> None:
        """Where all is far over the limit, time the nearest: it is worth knowing what it would give."""
        others = self.points[1:]
        if others and all(point.times is None for point in others):
            nearest = min(others, key=lambda one: self.bench.limit.times(one.divergence, one.differing))
            (timed,) = self.bench.timed(self.exports.bundle(nearest.options), [nearest])
            self.points[self.points.index(nearest)] = timed

    def best(self) -> int | None:
        """The index of the fastest point that is faster than the whole model and holds; None if there is none."""
        good = [n for n, one in enumerate(self.points) if n and one.verdict == "within" and one.speed > 1]
        return max(good, key=lambda n: self.points[n].speed, default=None)

    def _singles(self) -> Iterator[Job]:
        """Each thing alone."""
        for scheme in _SCHEMES:
            if scheme is not None:
                yield Job(ExportOptions(self.fit.whole, scheme=scheme), {"": {"": self.fit.keep_all}})
        for policy in self.fit.curves:
            yield Job(ExportOptions(policy))

    def _combinations(self) -> Iterator[Job]:
        """What is faster and holds alone, together: settings of a policy with a scheme."""
        good = [one for one in self.points[1:] if one.verdict == "within" and one.speed > 1]
        schemes = [one.options.scheme for one in good if one.options.scheme and one.options.policy == self.fit.whole]
        for policy in self.fit.curves:
            found = [one for one in good if one.options == ExportOptions(policy)]
            if not found:
                continue
            found.sort(key=lambda one: one.speed)
            fastest, settings = found[-1], {one.setting: one.keep for one in found}
            for scheme in schemes:
                options = replace(fastest.options.by_default(fastest.keep), scheme=scheme)
                if options not in self._seen:
                    self._seen.add(options)
                    yield Job(options, {"": settings})

    def _drafts(self, best: TunePoint) -> Iterator[Job]:
        """The best form with a draft, which changes no text."""
        options = best.options.by_default(best.keep)
        yield Job(replace(options, draft="auto"), {"": {best.setting: AS_EXPORTED}}, like=best)
        if options.rule == LAYERS.name:
            yield Job(replace(options, draft="layers:auto"), {"": {best.setting: AS_EXPORTED}}, like=best)

    def _cost(self, options: ExportOptions) -> float:
        """About how many seconds an export and its measurements take."""
        settings = _USUAL_SETTINGS if options in map(ExportOptions, self.fit.curves) else 1
        measuring = self._measuring * settings
        if self.exports.place(options).is_dir():
            return measuring
        units = self.bench.exports_of(self._kind(options))
        if units is None:
            plain = options.scheme is None and options.draft is None
            units = _SCHEMES[options.scheme]
            units += _CALIBRATING if plain and self.exports.reads_text(options) else 0
            units += _SEARCHING if options.draft else 0
        return self._unit * units + measuring

    def _kind(self, options: ExportOptions) -> str:
        """What an export takes depends on: whether it reads text, the scheme, and the draft."""
        calibrates = options.scheme is None and self.exports.reads_text(options)
        parts = (f"thresholds of {options.rule}" if calibrates else None, options.scheme, options.draft)
        return ", ".join(filter(None, parts)) or "plain"

    def _maybe(self, job: Job) -> None:
        """Try it, if the time is enough."""
        cost, left = self._cost(job.options), self.ends - time.monotonic()
        if left < cost:
            self.left_out[job.options.name] = f"no time was left: it takes about {in_words(cost)}"
            return
        self._try(job)

    def _try(self, job: Job) -> None:
        try:
            bundle = self._export(job.options)
        except GsxError as error:  # calibration may find that a share cannot be met; a package may be missing
            self.left_out[job.options.name] = error.what
            return
        began = time.monotonic()
        found: list[TunePoint] = []
        for settings in (job.settings or self._settings(job.options, bundle)).values():
            for setting, keep in settings.items():
                point = self.bench.scored(bundle, job.options, keep, setting, job.like)
                if point is None:  # the whole model again
                    continue
                if point.verdict == "lost early":
                    self.points.append(point)
                    break
                found.append(point)
        self.points += (
            [self.bench.timed_surely(bundle, point) for point in found] if job.sure else self.bench.timed(bundle, found)
        )
        if found:
            self._measuring = max(self._measuring, (time.monotonic() - began) / len(found))

    def _export(self, options: ExportOptions) -> Bundle:
        began, kept = time.monotonic(), self.exports.place(options).is_dir()
        bundle = self.exports.bundle(options)
        if not kept:
            seconds = time.monotonic() - began
            self.bench.note_export(bundle, seconds)
            if self._unit:
                self.bench.note_export_of(self._kind(options), seconds / self._unit)
        return bundle

    def _settings(self, options: ExportOptions, bundle: Bundle) -> Settings:
        curves = {name: of(bundle.manifest) for name, of in self.fit.curves[options.policy].items()}
        return curves if options.rule != LAYERS.name else {"least harm": self._least_harm(), **curves}

    def _least_harm(self) -> dict[str, KeepSettings]:
        """Sets without the layers that do least harm, found on a part of the calibration text."""
        sets = self.bench.kept_sets() or self._find_sets()
        depth = self.checkpoint.config.num_layers
        return {
            f"without {depth - len(kept)} of {depth} layers": KeepSettings(
                layers=places_text([(layer, branch) for layer in kept for branch in BRANCHES])
            )
            for kept in sets
        }

    def _find_sets(self) -> list[list[int]]:
        ids = self.sets_text.ids[: max(1, _SETS_TOKENS // self.sets_text.ids.shape[1])]
        search = least_harm(self.checkpoint, ids, self.on_progress, _SETS_SHARE * self.seconds)
        whole = next(search)
        found: list[list[int]] = []
        for one in search:
            if self.bench.is_far(float(one.nats.mean() - whole.nats.mean())):
                break
            found.append(list(one.kept))
            if len(found) == _MOST_SETS:
                break
        self.bench.keep_sets(found)
        return found

    def _refuse_time(self) -> None:
        waiting = [why for why in self.left_out.values() if why.startswith("no time")]
        if waiting:
            spent = self.seconds - (self.ends - time.monotonic())
            raise UsageError(
                "--time is too short for one measurement beside the whole model's",
                expected=f"about {in_words(spent + self._unit * _SCHEMES['int8-weights'] + self._measuring)} or more",
                found=in_words(self.seconds),
                todo="the whole model's bundle is kept: run it again with more --time",
            )
