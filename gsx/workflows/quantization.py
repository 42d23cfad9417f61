"""The quantization step of `gsx export`: ranges, codes, what they cost, and what must be spared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.controls import RuntimeValues, at_budget
from gsx_engines.bundle.manifest import MeasuredQuality, Quantization
from gsx_engines.bundle.selection import CalibrationText, Selection
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.quantization.chosen import ChosenCodes
from gsx_exporter.quantization.plan import QuantizationPlan, make_plan, named
from gsx_exporter.quantization.scheme import EMBEDDING, GATES, SCHEMES
from gsx_exporter.quantization.statistics import Statistics
from gsx_exporter.text import TokenText
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import OnProgress


def plan_for(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    wanted: Quantize,
    selection: Selection | None,
    defaults: RuntimeValues,
    text: TokenText,
    unseen: TokenText,
    scratch: Path,
    on_progress: OnProgress,
) -> tuple[QuantizationPlan, Quantization]:
    """The quantization plan, and its entry in the manifest.

    Args:
        selection: the exported one; None if the keep rule has no budget.
        defaults: exported values of the keep rule's run-time inputs.
        text: calibration text.
        unseen: text to measure the cost on.
        scratch: folder for codes, as large as the quantized weights; the plan reads them there.
        on_progress: called with the progress.
    Raises:
        GsxError: ModelOpt is not installed; a limit does not hold.
    """
    _need_modelopt()
    defaults = _every_loop(checkpoint, defaults)
    from gsx.workflows.quantization_cost import settle
    from gsx_exporter.quantization.choose import choose_codes
    from gsx_exporter.quantization.watch import statistics

    scheme = SCHEMES[wanted.scheme]
    found: Statistics | None = None
    if scheme.reads_inputs:
        found = statistics(
            checkpoint,
            text.ids,
            [defaults, *_other_budgets(selection, defaults)],
            options,
            text_sha256=text.sha256,
            cache=wanted.cache,
            on_progress=on_progress,
        )[0]
    plan = make_plan(checkpoint, scheme, found, ChosenCodes(scratch))
    if options.rule is not None and not wanted.everything:
        plan = plan.sparing_first()
    plan = plan.without(named(checkpoint.config, () if wanted.everything else wanted.keep_precision))
    if not plan.matrices:
        raise UsageError("nothing is left to quantize", found=f"--keep-precision {','.join(wanted.keep_precision)}")
    losses = choose_codes(plan, text.ids, defaults, options, on_progress) if scheme.chosen_on_text else {}
    plan, measured = settle(checkpoint, options, wanted, plan, losses, defaults, unseen, on_progress)
    entry = _entry(plan, wanted, selection, text, measured)
    return plan, entry


def _every_loop(checkpoint: Checkpoint, defaults: RuntimeValues) -> RuntimeValues:
    """Run-time inputs with which a looped model runs all its loops: a request may ask for them."""
    loops = checkpoint.config.loops
    if loops is None or "loops" not in defaults:
        return defaults
    return {**defaults, "loops": np.full_like(defaults["loops"], loops.most)}


def _other_budgets(selection: Selection | None, defaults: RuntimeValues) -> list[RuntimeValues]:
    """Run-time inputs at the budgets that are not exported: a whole grid costs little more than one budget, and the
    next export finds it in the cache."""
    if selection is None:
        return []
    others = [point.budget for point in selection.grid if point.budget != selection.budget]
    return [at_budget(defaults, selection, budget) for budget in others]


def _entry(
    plan: QuantizationPlan, wanted: Quantize, selection: Selection | None, text: TokenText, measured: MeasuredQuality
) -> Quantization:
    scheme, tied = plan.scheme, plan.checkpoint.config.tied_head
    no_product = tuple(GATES.values()) if tied else (EMBEDDING, *GATES.values())
    return Quantization(
        scheme=wanted.scheme,
        smoothing=scheme.smoothing,
        products=sum(not name.endswith(no_product) for name in plan.matrices),
        kept_high=plan.kept_high,
        weights_only=plan.weights_only,
        budget=selection.budget if scheme.activations and selection is not None else None,
        calibration=CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)
        if scheme.chosen_on_text
        else None,
        measured=measured,
    )


def _need_modelopt() -> None:
    try:
        import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        raise GsxError(
            "quantization needs NVIDIA ModelOpt, which is not installed",
            found=str(error),
            todo='pip install "gsx[quantize]"',
        ) from error
