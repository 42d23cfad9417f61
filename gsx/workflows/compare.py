"""`gsx compare`: all policies that a checkpoint supports; quality and time against the share kept.

Each policy is exported once into a work folder and stays there. The first half of a text is for calibration, and the
second half is measured. Every round times the whole model next to the settings of one bundle, so that a ratio compares
times of the same moment, and no more than two bundles are loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from gsx.comparison.measure import SECONDS, STEPS, MeasuredBundle, Score, in_turn
from gsx.comparison.report import CompareReport, Point
from gsx.defaults import COMPARE_FOLDER, COMPARE_TOKENS
from gsx.workflows.export import export
from gsx_engines.bundle.bundle import Bundle, open_bundle, sha256_of
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.errors import BundleError
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.errors import TextError
from gsx_exporter.rules.plan import PolicyOptions, RulePlan
from gsx_exporter.rules.registry import DENSE, every_rule, plan_policy
from gsx_exporter.text import MIN_TOKENS, TokenText, tokenize
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, prefixed, silent

LEAST_TOKENS = 512
WINDOW_TOKENS = 256
# Room for a prompt and for single tokens after it.
_LEAST_POSITIONS = 4 * STEPS
# With a limit of time, this share of it is for scoring and as much for timing; the rest goes into exports.
_MEASURING_SHARE = 0.25
# Settings that a policy has, for planning.
_USUAL_SETTINGS = 6


def compare(
    model: str | Path,
    work: str | Path = COMPARE_FOLDER,
    *,
    text: str | Path | None = None,
    tokens: int = COMPARE_TOKENS,
    seconds: float | None = None,
    on_progress: OnProgress = silent,
) -> CompareReport:
    """Compare all policies that a checkpoint supports: perplexity and measured time against the share kept.

    Args:
        model: a local model directory or a hub id.
        work: folder for the bundles; those of the same model, policy and calibration text are reused.
        text: UTF-8 text file; None for the text that ships with gsx.
        tokens: how many of its tokens to measure; as many before them are used for calibration.
        seconds: about how long it may take: fewer tokens are scored and settings are timed for a shorter time, and when
            the rest is shorter than one policy took, the others are left out. None for no limit.
        on_progress: called with the progress.
    Returns: the settings of every policy, and which policies were left out, with the reason; `write_page` writes it as
        one HTML page.
    Raises:
        GsxError: the model or the text cannot be used, or the folder cannot be written.
    Example:
        >>> report = gsx.compare("my-model", "out/compare", tokens=512)
        >>> report.points[0].policy
        'whole model'
        >>> report.write_page("out/compare.html")
    """
    began, limit = time.monotonic(), math.inf if seconds is None else seconds
    if tokens < LEAST_TOKENS:
        raise UsageError("tokens to compare on", expected=f"at least {LEAST_TOKENS}", found=str(tokens))
    checkpoint = open_checkpoint(model)
    positions = checkpoint.config.max_positions
    if positions < _LEAST_POSITIONS:
        raise UsageError(
            "the model is too short to compare on",
            expected=f"{_LEAST_POSITIONS} positions or more",
            found=str(positions),
        )
    calibration, windows = _halves(checkpoint, Path(text) if text else None, tokens)
    rules, left_out = every_rule()
    compared = {policy: curves for rule in rules.values() for policy, curves in rule.compared.items()}
    # The whole model is the first of these that fits the checkpoint: where gates or routers multiply a branch's output,
    # there is no dense export.
    whole_models = {
        DENSE: KeepSettings(),
        **{rule.name: rule.whole for rule in rules.values() if rule.whole is not None},
    }
    plans, refused = _plans(checkpoint, [*whole_models, *compared])
    left_out |= {_name(policy): why for policy, why in refused.items() if policy in compared}
    exports = _Exports(checkpoint, Path(work), calibration, on_progress)
    base, keep_all = next((policy, keep) for policy, keep in whole_models.items() if policy in plans)
    fitting = [policy for policy in compared if policy in plans]
    bundle = exports.bundle(base, plans[base])
    measuring = limit * _MEASURING_SHARE / max(1, len(fitting))
    if seconds is not None:
        windows = windows[: _windows_in(measuring / _USUAL_SETTINGS, bundle, windows, keep_all)]
    whole = MeasuredBundle(bundle, windows)
    whole_score = whole.score(keep_all)
    whole_seconds: list[np.ndarray] = []
    points: list[Point] = []
    longest = 0.0
    for policy in fitting:
        curves, name, started = compared[policy], _name(policy), time.monotonic()
        if whole_seconds and started - began + longest > limit:
            left_out[name] = "no time was left"
            continue
        try:
            bundle = exports.bundle(policy, plans[policy])
        except UsageError as error:  # calibration may find that the model cannot reach the default share
            left_out[name] = error.what
            continue
        measured = whole if bundle == whole.bundle else MeasuredBundle(bundle, windows)
        settings = [
            (curve, setting, keep)
            for curve, settings_of in curves.items()
            for setting, keep in settings_of(bundle.manifest).items()
        ]
        timing = min(SECONDS, measuring)
        found, own = _points(measured, settings, (whole, keep_all), timing, prefixed(on_progress, name))
        points += found
        whole_seconds.append(own)
        longest = max(longest, time.monotonic() - started)
    every = np.concatenate(whole_seconds)
    return CompareReport(
        model=checkpoint.source,
        text=calibration.text.name,
        tokens=windows.size,
        prompt_tokens=whole.prompt_tokens,
        window_tokens=windows.shape[1],
        points=(_point("whole model", base, whole_score, every, every), *points),
        left_out=left_out,
    )


def _plans(checkpoint: Checkpoint, policies: Sequence[str]) -> tuple[dict[str, RulePlan], dict[str, str]]:
    """The rule plans of the policies that fit a checkpoint, and why the others do not."""
    plans: dict[str, RulePlan] = {}
    refused: dict[str, str] = {}
    for policy in dict.fromkeys(policies):
        try:
            plans[policy] = plan_policy(PolicyOptions(policy), checkpoint.config)
        except UsageError as error:
            refused[policy] = error.what
    return plans, refused


def _points(
    measured: MeasuredBundle,
    settings: Sequence[tuple[str, str, KeepSettings]],
    whole: tuple[MeasuredBundle, KeepSettings],
    timing: float,
    on_progress: OnProgress,
) -> tuple[list[Point], np.ndarray]:
    """Score the settings of one bundle, then time them in turn with the whole model.

    Args: settings: curve, name of the setting, and the keep settings of a request; timing: for how many seconds.
    Returns: a point for each setting, and the whole model's seconds [R, 2] in the same rounds.
    """
    scores = []
    for number, (_, _, keep) in enumerate(settings):
        on_progress(Progress("scoring", number, len(settings)))
        scores.append(measured.score(keep))
    seconds = in_turn([whole, *((measured, keep) for _, _, keep in settings)], timing, on_progress)
    points = [
        _point(curve, setting, score, seconds[:, number], seconds[:, 0])
        for number, ((curve, setting, _), score) in enumerate(zip(settings, scores, strict=True), 1)
    ]
    return points, seconds[:, 0]


def _windows_in(seconds: float, bundle: Bundle, windows: np.ndarray, keep: KeepSettings) -> int:
    """How many windows are scored in some seconds, at least as many as the fewest tokens need."""
    least = math.ceil(LEAST_TOKENS / windows.shape[1])
    measured = MeasuredBundle(bundle, windows[:1])
    measured.score(keep)
    began = time.monotonic()
    measured.score(keep)
    return max(least, int(seconds / (time.monotonic() - began)))


@dataclass(frozen=True)
class _Calibration:
    """The part of a text to calibrate on: its first tokens. Args: path: None for the text that ships with gsx."""

    path: Path | None
    text: TokenText
    tokens: int


def _halves(checkpoint: Checkpoint, path: Path | None, tokens: int) -> tuple[_Calibration, np.ndarray]:
    """A text's first half, to calibrate on, and the windows [M, S] of its second half."""
    text = tokenize(checkpoint, path, max_tokens=2 * tokens, window=WINDOW_TOKENS)
    half = len(text.ids) // 2
    # The tokens that a tokenizer begins every window with are not part of the text.
    start = len(load_tokenizer(checkpoint).encode("").ids)
    calibration_tokens = half * (text.ids.shape[1] - start)
    if calibration_tokens < MIN_TOKENS:
        raise TextError(
            f"{text.name}: the text is too short to calibrate on one half of it and measure the other",
            expected=f"at least {2 * LEAST_TOKENS} tokens",
            found=f"{text.tokens} in whole windows",
        )
    return _Calibration(path, text, calibration_tokens), text.ids[half:]


class _Exports:
    """Bundles in a work folder, found by what they were exported from."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, calibration: _Calibration, on_progress: OnProgress
    ) -> None:
        self._checkpoint, self._folder, self._calibration = checkpoint, folder, calibration
        self._on_progress = on_progress
        self._source = source_sha256()
        self._model = [checkpoint.weights_sha256(), *(sha256_of(path) for path in checkpoint.companions())]

    def bundle(self, policy: str, plan: RulePlan) -> Bundle:
        """The bundle of a policy: the existing one, if it is complete, or a new one."""
        ingredients = [self._source, policy, *self._model]
        calibration = self._calibration if plan.calibrates else None
        if calibration is not None:
            ingredients += [calibration.text.sha256, str(calibration.tokens)]
        key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
        place = self._folder / f"{plan.name}-{key[:12]}"
        try:
            return open_bundle(place, check_weights=True)
        except BundleError:
            pass
        return export(
            self._checkpoint.source,
            place,
            policy=policy,
            calibration=calibration.path if calibration is not None else None,
            calibration_tokens=self._calibration.tokens,
            overwrite=True,
            on_progress=prefixed(self._on_progress, plan.name),
        )


def source_sha256() -> str:
    """Hash of gsx's own Python source: another version of it may export another bundle."""
    digest = hashlib.sha256()
    for package in ("gsx", "gsx_exporter", "gsx_engines", "gsx_plugins"):
        for path in sorted(Path(str(import_module(package).__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _name(policy: str) -> str:
    return policy.partition(":")[0]


def _point(curve: str, setting: str, score: Score, seconds: np.ndarray, whole: np.ndarray) -> Point:
    """A setting's row in the report. Args: seconds, whole: [R, 2], of the same rounds."""
    prefill_ms, token_ms = (1000 * np.median(seconds, axis=0)).tolist()
    prefill_ratio, token_ratio = np.median(seconds / whole, axis=0).tolist()
    return Point(
        policy=curve,
        setting=setting,
        prompt_kept=score.prompt_kept,
        kept=score.kept,
        perplexity=score.perplexity,
        prefill_ms=prefill_ms,
        prefill_ratio=prefill_ratio,
        token_ms=token_ms,
        token_ratio=token_ratio,
    )
