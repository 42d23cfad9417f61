"""Confidence at an exit (policy `calm`): its measures, the range of each, and its part of the manifest."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, PlainSerializer

from gsx_engines.bundle.fields import Section
from gsx_plugins.errors import UsageError

Measure = Literal["softmax", "state", "classifier"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class Range(NamedTuple):
    """Least and largest value of a measure."""

    least: float
    most: float


RANGES: dict[Measure, Range] = {
    "softmax": Range(0.0, 1.0),
    "state": Range(-1.0, 1.0),
    "classifier": Range(0.0, 1.0),
}


def check_threshold(threshold: float, least: float, most: float) -> None:
    """Refuse a threshold outside a measure's range; plus infinity, at which nothing leaves, is allowed.

    Raises:
        UsageError: it is.
    """
    if threshold != math.inf and not least <= threshold <= most:
        raise UsageError(
            "the exit threshold lies outside the measure's range",
            expected=f"{least:g} to {most:g}, or inf to leave nothing out",
            found=f"{threshold:g}",
        )


class TestedThreshold(Section):
    """An exit threshold that was tried: mean risk, p-value of "above the tolerance", and share of branches that ran."""

    threshold: float
    mean_risk: float
    p_value: float
    accepted: bool
    kept_share: float


class Guarantee(Section):
    """What Learn then Test promises of the exported exit threshold (docs/calm.md).

    Args:
        risk: `agreement`, the share of next tokens that are not the whole model's; `loss`, nats above its loss.
        tolerance: that the mean risk of a prompt is at most this ...
        confidence: ... with this probability over the draw of the prompts.
        prompts, prompt_tokens: how many there were, and how long.
        tested: the walk, from the most careful threshold on.
    """

    risk: Literal["agreement", "loss"]
    tolerance: float
    confidence: float
    prompts: int
    prompt_tokens: int
    tested: tuple[TestedThreshold, ...]


class Confidence(Section):
    """When a token leaves at an exit (policy `calm`).

    Args:
        measure: of confidence.
        threshold: the exported one.
        decay, decay_tokens: tau and N of threshold x (0.9 + 0.1 exp(-tau t / N)), t the token's number; 0: none.
        guarantee: null where the threshold was given.
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
