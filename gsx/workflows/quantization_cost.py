"""What a quantized model costs, measured while it is exported; sparing what the limits need spared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from gsx.parity.estimate import Estimate
from gsx.parity.quality import OF_SCHEMES, QualityLimits, closeness, frequency_nats
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import Interval, MeasuredQuality
from gsx_engines.bundle.selection import CalibrationText
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.quantization.plan import QuantizationPlan
from gsx_exporter.quantization.sensitivity import Tried, spare
from gsx_exporter.quantization.simulate import Cost, Simulation
from gsx_exporter.text import TokenText
from gsx_plugins.errors import GsxError
from gsx_plugins.progress import OnProgress

# Number of groups that an error names.
_NAMED_GROUPS = 3
# Share of the limit of the KL divergence that an export may use, so that other text stays within it too.
_MARGIN = 0.8


def settle(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    wanted: Quantize,
    plan: QuantizationPlan,
    losses: Mapping[str, float],
    controls: RuntimeValues,
    unseen: TokenText,
    on_progress: OnProgress,
) -> tuple[QuantizationPlan, MeasuredQuality]:
    """Measure a plan; where it is over the limits, spare the products that lose most.

    Args: losses: what each product loses by itself.
    Raises:
        GsxError: no plan is within the limits, of a model that can be judged.
    """
    limits = wanted.limits.over(OF_SCHEMES[wanted.scheme])
    simulation = Simulation(checkpoint, unseen, controls, options, on_progress)

    def holds(cost: Cost) -> bool:
        return not _judgeable(cost, unseen) or not broken(cost, limits)

    tried = [Tried(plan, (), simulation.cost(plan))] if wanted.everything else spare(simulation, plan, losses, holds)
    last = tried[-1]
    within, close = holds(last.cost), closeness(last.cost.windows)
    asked = wanted.limits != QualityLimits()
    if not within and (asked or not wanted.everything):
        raise _not_met(wanted, tried, limits)
    return last.plan, MeasuredQuality(
        text=CalibrationText(name=unseen.name, sha256=unseen.sha256, tokens=unseen.tokens),
        divergence=_interval(close.divergence),
        differing=_interval(close.differing),
        perplexity_increase=_interval(close.perplexity),
        flipped=last.cost.flipped if options.rule is not None else None,
        verdict=_verdict(_judgeable(last.cost, unseen), within),
    )


def _verdict(judgeable: bool, within: bool) -> Literal["within limits", "over limits", "not judged"]:
    if not judgeable:
        return "not judged"
    return "within limits" if within else "over limits"


def broken(cost: Cost, limits: QualityLimits) -> list[str]:
    """What is over the limits, each in words.

    For perplexity (up or down) and next tokens the text may be too short to decide: they are broken if the whole
    interval is beyond the limit.
    """
    close, found = closeness(cost.windows), list[str]()
    # Written so that NaN is over every limit.
    if limits.divergence is not None and not close.divergence.value <= _MARGIN * limits.divergence:
        found.append(f"KL divergence {close.divergence.value:.4f} nats")
    if limits.top1 is not None and not close.differing.nearest <= 1 - limits.top1:
        found.append(f"{1 - close.differing.value:.1%} same next token")
    if limits.perplexity_increase is not None and not close.perplexity.nearest <= limits.perplexity_increase:
        found.append(f"perplexity {close.perplexity.value:+.2%}")
    if limits.flipped is not None and cost.flipped > limits.flipped:
        found.append(f"{cost.flipped:.2%} of decisions flipped")
    return found


def _judgeable(cost: Cost, text: TokenText) -> bool:
    """Whether the model itself predicts the text better than its tokens' frequencies do."""
    return float(np.concatenate([one.reference_losses for one in cost.windows]).mean()) < frequency_nats(
        text.ids[:, 1:]
    )


def _interval(found: Estimate) -> Interval:
    return Interval(value=found.value, low=found.low, high=found.high)


def _not_met(wanted: Quantize, tried: Sequence[Tried], limits: QualityLimits) -> GsxError:
    rows = "; ".join(
        f"{len(one.spared)} groups spared: {', '.join(broken(one.cost, limits)) or 'within limits'}" for one in tried
    )
    named = ", ".join(tried[-1].spared[:_NAMED_GROUPS])
    return GsxError(
        f"--{wanted.scheme}: the requested quality is not met" + (f"; what loses most: {named}" if named else ""),
        expected=in_words(limits),
        found=rows,
        todo="give other limits, leave more out with --keep-precision NAMES, or accept the cost with "
        "--keep-precision none",
    )


def in_words(limits: QualityLimits) -> str:
    """Limits in one line."""
    words = (
        (limits.divergence, "KL divergence at most {:g} nats"),
        (limits.top1, "at least {:g} of next tokens the same"),
        (limits.perplexity_increase, "perplexity within {:g}"),
        (limits.flipped, "at most {:g} of decisions flipped"),
    )
    return ", ".join(text.format(limit) for limit, text in words if limit is not None)
