"""`gsx tune`: the fastest bundle of a model on this machine within a loss of quality that the user accepts.

What is tried and in which order is in `tune_search.py`, and how it is measured in `gsx/tuning/`. Bundles and
measurements stay in the work folder, so a second run goes on where the first one ended.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from shutil import copytree

from gsx.benchmarking.machine import machine
from gsx.comparison.measure import LEAST_TOKENS, WholeModel
from gsx.defaults import (
    DIVERGENCE_LIMIT,
    TUNE_FOLDER,
    TUNE_NEW_TOKENS,
    TUNE_PROMPT_TOKENS,
    TUNE_SECONDS,
    TUNE_TOKENS,
)
from gsx.parity.store import Store
from gsx.tuning.bench import Bench
from gsx.tuning.ledger import Ledger
from gsx.tuning.limit import Limit
from gsx.tuning.report import TunePoint, TuneReport
from gsx.workflows.fitting import fitting_policies
from gsx.workflows.kept_exports import CalibrationPart, KeptExports, halves
from gsx.workflows.memory import check_memory
from gsx.workflows.tune_search import Search
from gsx_engines.bundle.bundle import Bundle, check_target, writing
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.defaults import CALIBRATION_TOKENS
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import plan_policy
from gsx_exporter.text import read_text
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# Memory next to each other: two processes with a bundle each, or the whole model in PyTorch and what it reads.
_COPIES = 2.5
# Room for a window of text.
_LEAST_POSITIONS = 64


def tune(
    model: str | Path,
    output: str | Path,
    *,
    max_loss: float | None = None,
    min_same: float | None = None,
    seconds: float = TUNE_SECONDS,
    work: str | Path = TUNE_FOLDER,
    text: str | Path | None = None,
    tokens: int = TUNE_TOKENS,
    prompt_tokens: int = TUNE_PROMPT_TOKENS,
    new_tokens: int = TUNE_NEW_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> TuneReport:
    """Find the fastest bundle of a model on this machine within a loss of quality, and write it.

    Args:
        model: a local model directory or a hub id.
        output: the best bundle's directory; appears whole or not at all.
        max_loss: largest mean KL divergence of the next-token distributions from the whole model's, in nats.
        min_same: least share of tokens whose most likely next token is the whole model's. Without both, `max_loss` is
            0.02, the limit that `gsx verify` has for 8 bits.
        seconds: about how long it may take.
        work: folder for bundles and measurements; those that are there are used again.
        text: UTF-8 text file; None for the text that ships with gsx.
        tokens: how many of its tokens to measure; as many before them are used for calibration.
        prompt_tokens, new_tokens: of the answers that are timed.
        overwrite: replace a bundle that is already at `output`.
        on_progress: called with the progress.
    Returns: what was tried, with the Pareto front and the best; `write_page` writes it as one HTML page. If nothing
        within the limit is faster than the whole model, `best` is None and nothing is written.
    Raises:
        GsxError: the model or the text cannot be used, there is not enough memory, or the time is too short for one
            measurement.
    Example:
        >>> report = gsx.tune("my-model", "out/tuned", max_loss=0.05, seconds=120, work="out/tune", tokens=512)
        >>> report.points[0].times.ratio.median
        1.0
        >>> report.write_page("out/tune.html")
    """
    began = time.monotonic()
    limit = Limit(DIVERGENCE_LIMIT if max_loss is None and min_same is None else max_loss, min_same)
    _check_numbers(tokens, prompt_tokens, new_tokens, seconds)
    check_target(Path(output), overwrite)
    on_progress(Progress("checking the checkpoint"))
    checkpoint = open_checkpoint(model)
    _check_model(checkpoint, prompt_tokens + new_tokens)
    path, folder = Path(text) if text else None, Path(work)
    calibration, windows = halves(checkpoint, path, tokens)

    def shown(progress: Progress) -> None:
        on_progress(replace(progress, share=min(1.0, (time.monotonic() - began) / seconds)))

    exports = KeptExports(checkpoint, folder, calibration, shown)
    fit = fitting_policies(checkpoint.config)
    folder.mkdir(parents=True, exist_ok=True)
    with Store(folder) as store:
        bench = Bench(
            ledger=Ledger(folder),
            logits=WholeModel(store),
            windows=windows,
            of_text=f"{calibration.text.sha256[:12]} after {calibration.tokens}",
            prompts=read_text(path)[0],
            limit=limit,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seconds=seconds,
            on_progress=shown,
        )
        search = Search(checkpoint, exports, fit, bench, calibration.text, began + seconds, seconds, shown)
        search.run()
        best = search.settle()
    points = search.points
    if best is not None:
        _write(exports.bundle(points[best].options), Path(output), overwrite)
    report = TuneReport(
        model=checkpoint.source,
        limit=limit,
        text=calibration.text.name,
        tokens=len(bench.windows) * (windows.shape[1] - windows.shape[1] // 2),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        points=tuple(points),
        best=best,
        command="",
        output=str(output) if best is not None else None,
        left_out=dict(search.left_out),
        work=str(folder),
        taken_over=bench.taken_over,
        seconds=time.monotonic() - began,
        date=date.today().isoformat(),
        machine=machine(("gsx", "onnxruntime")),
    )
    shown_point = (points[best] if best is not None else report.nearest) or points[0]
    words = _words(checkpoint, exports, shown_point, calibration)
    return replace(report, command=shlex.join(["gsx", "export", str(model), *words, "-o", str(output)]))


def _check_numbers(tokens: int, prompt_tokens: int, new_tokens: int, seconds: float) -> None:
    given = (("tokens to tune on", tokens, LEAST_TOKENS), ("prompt tokens", prompt_tokens, 1))
    for name, number, least in (*given, ("new tokens", new_tokens, 2)):
        if number < least:
            raise UsageError(name, expected=f"at least {least}", found=str(number))
    if not seconds > 0:
        raise UsageError("seconds to tune", expected="more than 0", found=f"{seconds:g}")


def _check_model(checkpoint: Checkpoint, answer_tokens: int) -> None:
    """Refuse a model that is too short or too large, before anything is done."""
    needed, room = max(_LEAST_POSITIONS, answer_tokens), checkpoint.config.max_positions
    if room < needed:
        raise UsageError(
            "the model's context is too short to tune on",
            expected=f"{needed} positions or more",
            found=str(room),
            todo="shorten the answers with --prompt-tokens and --new-tokens",
        )
    check_memory(
        "not enough memory to tune this model",
        _COPIES * checkpoint.weight_bytes(),
        "the whole model in float32 next to what is tried",
        "tune on a machine with more memory, or export one form and measure it alone: gsx export, gsx bench",
    )


def _words(checkpoint: Checkpoint, exports: KeptExports, point: TunePoint, calibration: CalibrationPart) -> list[str]:
    """The options of `gsx export` that make a bundle which does by default what a point does."""
    options = point.options.by_default(point.keep)
    if options.draft is not None and options.draft.endswith("auto"):
        draft = exports.bundle(options).manifest.draft
        assert draft is not None
        options = replace(options, draft=str(draft.draft))
    default = plan_policy(PolicyOptions(), checkpoint.config).name
    words = options.words(default)
    if exports.reads_text(options):
        words += [] if calibration.path is None else ["--calibration", str(calibration.path)]
        words += [] if calibration.tokens == CALIBRATION_TOKENS else ["--calibration-tokens", str(calibration.tokens)]
    return words


def _write(bundle: Bundle, output: Path, overwrite: bool) -> None:
    """Copy a bundle from the work folder."""
    size = sum(path.stat().st_size for path in bundle.directory.rglob("*") if path.is_file())
    with writing(output, overwrite=overwrite, needed_bytes=size) as work:
        copytree(bundle.directory, work, dirs_exist_ok=True)
