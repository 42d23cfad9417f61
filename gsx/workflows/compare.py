"""`gsx compare`: all policies that a checkpoint supports; quality and time against the share kept.

Each policy is exported once into a work folder and stays there. The first half of a text is for calibration, and the
second half is measured. Every round times the whole model next to the settings of one bundle, so that a ratio compares
times of the same moment, and no more than two bundles are loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gsx.comparison.measure import LEAST_TOKENS, SECONDS, STEPS, MeasuredBundle, Score, WholeModel, in_turn, windows_in
from gsx.comparison.options import ExportOptions
from gsx.comparison.report import CompareReport, Point
from gsx.defaults import COMPARE_FOLDER, COMPARE_TOKENS
from gsx.parity.store import Store
from gsx.workflows.fitting import fitting_policies, name_of
from gsx.workflows.kept_exports import KeptExports, halves
from gsx_engines.bundle.controls import KeepSettings
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, prefixed, silent

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
    calibration, windows = halves(checkpoint, Path(text) if text else None, tokens)
    fit = fitting_policies(checkpoint.config)
    base, keep_all, left_out = fit.whole, fit.keep_all, dict(fit.refused)
    done = 0

    def shown(progress: Progress) -> None:
        on_progress(replace(progress, share=done / len(fit.curves)))

    exports = KeptExports(checkpoint, Path(work), calibration, shown)
    bundle = exports.bundle(ExportOptions(base))
    measuring = limit * _MEASURING_SHARE / max(1, len(fit.curves))
    if seconds is not None:
        windows = windows[: windows_in(measuring / _USUAL_SETTINGS, bundle, windows, keep_all)]
    with Store(Path(work)) as store:
        logits = WholeModel(store)
        whole = MeasuredBundle(bundle, windows)
        whole_score = whole.score(keep_all, logits)
        whole_seconds: list[np.ndarray] = []
        points: list[Point] = []
        longest = 0.0
        for policy, curves in fit.curves.items():
            name, started = name_of(policy), time.monotonic()
            if whole_seconds and started - began + longest > limit:
                left_out[name] = "no time was left"
                continue
            try:
                bundle = exports.bundle(ExportOptions(policy))
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
            found, own = _points(measured, settings, logits, (whole, keep_all), timing, prefixed(shown, name))
            points += found
            whole_seconds.append(own)
            longest, done = max(longest, time.monotonic() - started), done + 1
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


def _points(
    measured: MeasuredBundle,
    settings: Sequence[tuple[str, str, KeepSettings]],
    logits: WholeModel,
    whole: tuple[MeasuredBundle, KeepSettings],
    timing: float,
    on_progress: OnProgress,
) -> tuple[list[Point], np.ndarray]:
    """Score the settings of one bundle, then time them in turn with the whole model.

    Args:
        settings: curve, name of the setting, and the keep settings of a request.
        logits: of the whole model.
        whole: it, to time next to them; timing: for how many seconds.
    Returns: a point for each setting, and the whole model's seconds [R, 2] in the same rounds.
    """
    scores = []
    for number, (_, _, keep) in enumerate(settings):
        on_progress(Progress("scoring", number, len(settings)))
        scores.append(measured.score(keep, logits))
    seconds = in_turn([whole, *((measured, keep) for _, _, keep in settings)], timing, on_progress)
    points = [
        _point(curve, setting, score, seconds[:, number], seconds[:, 0])
        for number, ((curve, setting, _), score) in enumerate(zip(settings, scores, strict=True), 1)
    ]
    return points, seconds[:, 0]


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
        divergence=score.divergence,
        differing=score.differing,
        prefill_ms=prefill_ms,
        prefill_ratio=prefill_ratio,
        token_ms=token_ms,
        token_ratio=token_ratio,
    )
