"""Confidence at an exit (policy `calm`): its measures, the range of each, and its part of the manifest."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, PlainSerializer

from gsx_engines.bundle.fields import Section
from gsx_plugins.errors import UsageError

Measure = Literal["softmax", "state", "classifier", "gate"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Range(NamedTuple):
    """Smallest and largest value of a measure."""

    least: float
    most: float


RANGES: dict[Measure, Range] = {
    "softmax": Range(0.0, 1.0),
    "state": Range(-1.0, 1.0),
    "classifier": Range(0.0, 1.0),
    "gate": Range(0.0, 1.0),
}


def check_threshold(threshold: float, least: float, most: float) -> None:
    """Refuse a threshold outside the range of its measure; plus infinity, at which no token exits, is allowed.

    Raises:
        UsageError: the threshold is outside the range.
    """
    if threshold != math.inf and not least <= threshold <= most:
        raise UsageError(
            "the exit threshold is outside the range of the confidence measure",
            expected=f"{least:g} to {most:g}, or inf for no exits",
            found=f"{threshold:g}",
        )


class TestedThreshold(Section):
    """A tested exit threshold.

    Args:
        threshold: the threshold.
        mean_risk: mean over the calibration prompts.
        p_value: of the hypothesis that the risk is above the tolerance.
        accepted: whether this hypothesis was rejected.
        kept_share: share of branches that ran.
    """

    threshold: float
    mean_risk: float
    p_value: float
    accepted: bool
    kept_share: float


class Guarantee(Section):
    """What Learn then Test guarantees for the exported exit threshold (docs/calm.md).

    Args:
        risk: `agreement`: share of next tokens that differ from the full model's; `loss`: nats above its loss.
        tolerance, confidence: the mean risk of a prompt is at most `tolerance`, with probability `confidence` over the
            draw of the calibration prompts.
        prompts, prompt_tokens: number of calibration prompts, and their length.
        tested: the thresholds in the order of the tests, from the most conservative one on.
    """

    risk: Literal["agreement", "loss"]
    tolerance: float
    confidence: float
    prompts: int
    prompt_tokens: int
    tested: tuple[TestedThreshold, ...]


class Confidence(Section):
    """When a token exits (policy `calm`).

    Args:
        measure: how confidence is measured.
        threshold: the exported threshold.
        decay, decay_tokens: tau and N in threshold x (0.9 + 0.1 exp(-tau t / N)), where t is the token's number; tau 0:
            no decay.
        guarantee: null if the threshold was given, not calibrated.
    """

    measure: Measure
    threshold: Annotated[
        float,
        BeforeValidator(lambda value: math.inf if value is None else value),
        PlainSerializer(lambda value: None if value == math.inf else value, return_type=float | None),
    ]
    decay: Annotated[float, Field(ge=0)]
    decay_tokens: Annotated[int, Field(ge=1)]
    guarantee: Guarantee | None
