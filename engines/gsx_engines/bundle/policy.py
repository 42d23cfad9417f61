"""The section `policy` of `gsx.json`: which tokens run which branch, and what the rule reads at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, PlainSerializer

from gsx_engines.bundle.confidence import Measure
from gsx_engines.bundle.fields import Branch, Section
from gsx_engines.bundle.selection import CalibrationText


class RuntimeInput(Section):
    """What the keep rule reads at run time, beside the tokens: an input of every graph that holds a rule's branches.

    Args:
        name: of the graph's input. `thresholds` [L, 2] and `budget` [] are float32, `layer_mask` [B, L, 2] float32
            (1: run, 0: skip), `full_until` [B] int64 (tokens at a position below it run every branch), `exit_threshold`
            [] float32 (confidence at which a token leaves).
        least, most: of its values; null: no bound. A threshold may also be infinite.
        default: the exported value, for a client that gives none; null where another section holds it.
    """

    name: Literal["thresholds", "budget", "layer_mask", "full_until", "exit_threshold"]
    least: float | None
    most: float | None
    default: JsonValue = None


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


class Policy(Section):
    """The keep rule: which tokens run which branch.

    Args:
        name: e.g. `gateskip`, `layers`.
        branches: those that it may skip, in every layer that it reaches.
        layers: those that it reaches; null: all.
        inputs: what it reads at run time.
        parameters: its own, as they were given, measured or calibrated.
        warm_up: new tokens that run every branch, after a prompt that does too (`full_until`); null: the rule applies
            to every token, the prompt's among them.
        exits: depths that the model was trained to leave at, where the rule is a set of layers; those at which `calm`
            asks.
        confidence: of `calm`.
        calibration: the text that they were found on; null where none was needed, or `selection` names it.
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
        """A run-time input by its name; None if the rule does not read it."""
        return next((one for one in self.inputs if one.name == name), None)


def gateskip_policy(mode: str, branches: Sequence[Branch]) -> Policy:
    """GateSkip's section of the manifest; mode: of the selection."""
    read = (
        RuntimeInput(name="budget", least=0, most=1)
        if mode == "rank"
        else RuntimeInput(name="thresholds", least=0, most=1)
    )
    return Policy(name="gateskip", branches=tuple(branches), inputs=(read,))
