"""The section `policy` of `gsx.json`: the keep rule, its parameters, and what it reads at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer

from gsx_engines.bundle.confidence import Measure
from gsx_engines.bundle.fields import Branch, Section
from gsx_engines.bundle.selection import CalibrationText


class RuntimeInput(Section):
    """A run-time input of the keep rule: an input of every graph with branches that the rule may skip.

    Args:
        name: of the graph's input: `thresholds` [L, 2] float32, `budget` [] float32, `layer_mask` [B, L, 2] float32
            (1: run, 0: skip), `full_until` [B] int64 (tokens at a position below it run every branch), or
            `exit_threshold` [] float32 (confidence at which a token exits).
        least, most: bounds of its values; null: no bound. A threshold may also be infinite.
        default: the exported value, for clients that give none; null where another section has it.
    """

    name: Literal["thresholds", "budget", "layer_mask", "full_until", "exit_threshold"]
    least: float | None
    most: float | None
    default: JsonValue = None


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


class Policy(Section):
    """The policy: a keep rule, which decides which tokens run which branch, with its parameters.

    Args:
        name: of the rule, e.g. `gateskip`, `layers`.
        branches: the branches that it may skip, in every layer that it applies to.
        layers: the layers that it applies to; null: all.
        inputs: what it reads at run time.
        parameters: its own parameters, as given, measured or calibrated.
        warm_up: how many new tokens run every branch, after a prompt that does so too (`full_until`); null: the rule
            applies to every token, including the prompt.
        exits: for sets of layers, the depths at which the model was trained to exit; for `calm`, the depths at which
            confidence is measured.
        confidence: for `calm`.
        calibration: the text that parameters were calibrated on; null if none was needed, or if `selection` names it.
    """

    name: str
    branches: tuple[Branch, ...]
    layers: tuple[int, ...] | None = None
    inputs: tuple[RuntimeInput, ...]
    parameters: Mapping[str, JsonValue] = Field(default_factory=dict)
    warm_up: Annotated[int, Field(ge=0)] | None = None
    exits: tuple[int, ...] = ()
    confidence: Confidence | None = None
    calibration: CalibrationText | None = None

    def input(self, name: str) -> RuntimeInput | None:
        """A run-time input by name; None if the rule does not read it."""
        return next((one for one in self.inputs if one.name == name), None)


def gateskip_policy(mode: str, branches: Sequence[Branch]) -> Policy:
    """The section for GateSkip.

    Args:
        mode: of the selection, `threshold` or `rank`.
        branches: the branches with gates.
    """
    read = (
        RuntimeInput(name="budget", least=0, most=1)
        if mode == "rank"
        else RuntimeInput(name="thresholds", least=0, most=1)
    )
    return Policy(name="gateskip", branches=tuple(branches), inputs=(read,))
