"""The quantization step of `gsx export`: statistics, plan, and what stays in full precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gsx.defaults import QUALITY_LIMIT
from gsx_engines.bundle.controls import RuntimeValues, selected
from gsx_engines.bundle.manifest import Quantization, SchemeName
from gsx_engines.bundle.selection import CalibrationText, Selection
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.quantization.plan import QuantizationPlan, make_plan, named
from gsx_exporter.quantization.scheme import EMBEDDING, GATES, SCHEMES
from gsx_exporter.text import TokenText
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import OnProgress

if TYPE_CHECKING:  # they load ModelOpt, which takes seconds
    from gsx_exporter.quantization.sensitivity import Chosen, Limits
    from gsx_exporter.quantization.simulate import Cost

AUTO, NONE = "auto", "none"
# A sensitivity pass runs the model once for every group of linear layers.
MEASURED_WINDOWS = 4
# Number of most costly groups that an error names.
_NAMED_GROUPS = 3


@dataclass(frozen=True)
class Quantize:
    """What `gsx export` quantizes to 8 bits.

    Args:
        scheme: `int8`, `fp8`: weights and activations; `int8-weights`: only weights.
        keep_precision: matrices to leave in high precision besides those that the scheme itself leaves, by name or
            pattern ("layers.0", "layers.*.mlp.down", "lm_head"); "none" leaves none of them in high precision; "auto"
            leaves those that the limits require.
        max_perplexity_increase, max_flipped: limits at the exported budget on calibration text, against full precision
            (0.01 is one percent). None: 0.01 with "auto", else not measured.
        cache: folder that keeps statistics between exports; None to keep none.
    Raises:
        UsageError: a limit is not a positive share, or "auto" or "none" is given together with names.
    """

    scheme: SchemeName
    keep_precision: tuple[str, ...] = ()
    max_perplexity_increase: float | None = None
    max_flipped: float | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_perplexity_increase", "max_flipped"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(name.replace("_", " "), expected="a share above 0, e.g. 0.01", found=f"{value:g}")
        if {AUTO, NONE} & set(self.keep_precision) and len(self.keep_precision) > 1:
            raise UsageError(
                "keep precision: auto or none cannot be combined with names",
                expected="auto, none, or names",
                found=",".join(self.keep_precision),
            )

    @property
    def auto(self) -> bool:
        """Whether a measurement decides which layers stay in high precision."""
        return AUTO in self.keep_precision

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return SCHEMES[self.scheme].activations or self.measured

    @property
    def measured(self) -> bool:
        """Whether the cost is measured before anything is written."""
        return self.auto or self.max_perplexity_increase is not None or self.max_flipped is not None


def plan_for(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    wanted: Quantize,
    selection: Selection | None,
    defaults: RuntimeValues,
    text: TokenText | None,
    on_progress: OnProgress,
    *,
    unseen: TokenText | None = None,
) -> tuple[QuantizationPlan, Quantization]:
    """The quantization plan, and its entry in the manifest.

    Args:
        selection: the exported one; None if the keep rule has no budget.
        defaults: exported values of the keep rule's run-time inputs.
        text: calibration text; None if only weights are quantized and nothing is measured.
        on_progress: called with the progress.
        unseen: text to measure the cost on; None for the end of the calibration text.
    Raises:
        GsxError: ModelOpt is not installed; a limit does not hold.
    """
    scheme = SCHEMES[wanted.scheme]
    if scheme.activations or wanted.measured:
        _need_modelopt()
    budget = selection.budget if selection else None
    found = None
    if scheme.activations:
        from gsx_exporter.quantization.watch import statistics

        assert text is not None
        # A whole grid costs little more than one budget, and the next export finds it in the cache.
        points = [defaults]
        if selection is not None:
            points += [
                {**defaults, **selected(selection, point.budget)} for point in selection.grid if point.budget != budget
            ]
        found = statistics(
            checkpoint,
            text.ids,
            points,
            options,
            text_sha256=text.sha256,
            cache=wanted.cache,
            on_progress=on_progress,
        )[0]
    everything = make_plan(checkpoint, scheme, found)
    names = () if wanted.keep_precision in ((AUTO,), (NONE,)) else wanted.keep_precision
    has_rule = options.rule is not None
    plan = everything.sparing() if has_rule and NONE not in wanted.keep_precision else everything
    plan = plan.without(named(checkpoint.config, names))
    if not plan.input_scales:
        raise UsageError("nothing is left to quantize", found=f"--keep-precision {','.join(names)}")
    if wanted.measured:
        assert text is not None
        plans = [everything, plan] if wanted.auto else [plan]
        sample = unseen or TokenText(text.ids[-MEASURED_WINDOWS:], text.sha256, text.name)
        plan = _measured(checkpoint, options, wanted, plans, defaults, sample, on_progress)
    entry = Quantization(
        scheme=wanted.scheme,
        smoothing=scheme.smoothing,
        products=sum(not name.endswith((EMBEDDING, *GATES.values())) for name in plan.input_scales),
        kept_high=plan.kept_high,
        budget=budget if scheme.activations else None,
        calibration=CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)
        if text is not None and scheme.activations
        else None,
    )
    return plan, entry


def _measured(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    wanted: Quantize,
    plans: Sequence[QuantizationPlan],
    controls: RuntimeValues,
    sample: TokenText,
    on_progress: OnProgress,
) -> QuantizationPlan:
    """The first plan that meets the limits; with auto, if none of them does, a part of the last one."""
    from gsx_exporter.quantization.sensitivity import Limits, choose
    from gsx_exporter.quantization.simulate import Simulation

    default = QUALITY_LIMIT if wanted.auto else math.inf
    limits = Limits(wanted.max_perplexity_increase or default, wanted.max_flipped or default)
    simulation = Simulation(
        checkpoint,
        sample,
        controls,
        options,
        on_progress,
    )
    for plan in plans[:-1]:
        if limits.hold(simulation.cost(plan)):
            return plan
    chosen = choose(simulation, plans[-1], limits, on_progress)
    if wanted.auto or not chosen.kept:
        return chosen.plan
    raise _not_met(wanted, limits, chosen)


def _not_met(wanted: Quantize, limits: Limits, chosen: Chosen) -> GsxError:
    cost, reduced = chosen.everything, chosen.cost
    names = [name for name in wanted.keep_precision if name != NONE]
    costly = ", ".join(
        f"{name} (divergence {group.divergence:.4f}, {group.flipped:.2%} flipped)"
        for name, group in chosen.ranking[:_NAMED_GROUPS]
    )
    return GsxError(
        f"--{wanted.scheme}: the requested quality is not met; most costly: {costly}",
        expected=", ".join(
            f"{what} at most {100 * limit:.3g}%"
            for what, limit in (("perplexity up", limits.perplexity_increase), ("flipped", limits.flipped))
            if limit < math.inf
        ),
        found=_in_words(cost),
        todo=f"it is met ({_in_words(reduced)}) with --keep-precision {','.join((*names, *chosen.kept))}",
    )


def _in_words(cost: Cost) -> str:
    return f"perplexity {cost.perplexity_increase:+.2%}, flipped {cost.flipped:.2%}"


def _need_modelopt() -> None:
    try:
        import modelopt.torch.quantization  # noqa: F401
    except ImportError as error:
        raise GsxError(
            "quantization needs NVIDIA ModelOpt, which is not installed",
            found=str(error),
            todo='pip install "gsx[quantize]"',
        ) from error
