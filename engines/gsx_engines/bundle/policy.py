"""The section `policy` of `gsx.json`: which tokens run which branch, and what the rule reads at run time.

Every keep rule has a section of its own, told apart by its name. The keys are the same for all; what a rule requires,
and the type of its parameters, differ. A rule of another package (docs/keep-rules.md) is an `OutsidePolicy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, JsonValue, Tag, WithJsonSchema

from gsx_engines.bundle.confidence import Confidence
from gsx_engines.bundle.fields import Section
from gsx_engines.bundle.selection import CalibrationText
from gsx_engines.bundle.words import Branch, SelectionMode


class RuntimeInput(Section):
    """A run-time input of the keep rule: an input of every graph with branches that the rule may skip.

    Args:
        name: of the graph's input: `thresholds` [B, L, 2] float32, `budget` [] float32, `layer_mask` [B, L, 2]
            float32 (1: run, 0: skip), `full_until` [B] int64 (tokens at a position below it run every branch),
            `exit_threshold` [B] float32 (confidence at which a token exits), or `loops` [B] int64 (how many loops run).
        least, most: bounds of its values; null: no bound. A threshold may also be infinite.
        default: the exported value, for clients that give none; null where another section has it.
    """

    name: Literal["thresholds", "budget", "layer_mask", "full_until", "exit_threshold", "loops"]
    least: float | None
    most: float | None
    default: JsonValue = None


class PolicySection(Section):
    """What the sections of all keep rules have; each rule adds its `name` and the type of its `parameters`.

    Args:
        branches: the branches that the rule may skip, in every layer that it applies to.
        layers: the layers that it applies to; null: all.
        inputs: what it reads at run time.
        warm_up: how many new tokens run every branch, after a prompt that does so too (`full_until`); null: the rule
            applies to every token, including the prompt.
        exits: for sets of layers, the depths at which the model was trained to exit; for `calm`, the depths at which
            confidence is measured.
        confidence: for rules with an exit threshold.
        calibration: the text that parameters were calibrated on; null if none was needed, or if `selection` names it.
    """

    # Whether the rule skips any branch that it is told to, and so can draft without some.
    skips_any_branch: ClassVar[bool] = False
    needs_gates: ClassVar[bool] = False

    branches: tuple[Branch, ...]
    layers: tuple[int, ...] | None = None
    inputs: tuple[RuntimeInput, ...]
    warm_up: Annotated[int, Field(ge=0)] | None = None
    exits: tuple[int, ...] = ()
    confidence: Confidence | None = None
    calibration: CalibrationText | None = None

    def input(self, name: str) -> RuntimeInput | None:
        """A run-time input by name; None if the rule does not read it."""
        return next((read for read in self.inputs if read.name == name), None)


class NoParameters(Section):
    """The parameters of a rule that has no parameters of its own."""


class GateSkipPolicy(PolicySection):
    """GateSkip: the checkpoint's gates decide."""

    skips_any_branch = True
    needs_gates = True

    name: Literal["gateskip"] = "gateskip"
    parameters: NoParameters = NoParameters()


class RouterParameters(Section):
    """The checkpoint's routers, as its `config.json` has them (docs/routers.md)."""

    router: Mapping[str, JsonValue]


class RouterPolicy(PolicySection):
    """Mixture-of-Depths and similar methods: the checkpoint's routers decide."""

    name: Literal["router"] = "router"
    parameters: RouterParameters


class LayersParameters(Section):
    """The exported set of layers, as `layer_sets.parse_places` reads it."""

    layers: str


class LayersPolicy(PolicySection):
    """A set of layers for each request."""

    skips_any_branch = True

    name: Literal["layers"] = "layers"
    parameters: LayersParameters


class UnifiedParameters(LayersParameters):
    """The exported set of layers, and the speed-up that it comes from."""

    speedup: float


class UnifiedPolicy(PolicySection):
    """Unified Layer Skipping: a set of layers by a target speed-up; the prompt runs in full."""

    skips_any_branch = True

    name: Literal["unified"] = "unified"
    parameters: UnifiedParameters


class FfnSkipParameters(Section):
    """FFN-SkipLLM's parameters.

    Args:
        stride: number of layers that are skipped after one similar layer.
        layers: `FIRST-LAST`, the layers whose FFNs may be skipped.
        similarity: by layer, the mean cosine of the states before and after its FFN on the calibration text.
    """

    stride: Annotated[int, Field(ge=1)]
    layers: Annotated[str, AfterValidator(lambda text: "-".join(map(str, _span(text))))]
    similarity: tuple[float, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First and last layer whose FFN may be skipped."""
        return _span(self.layers)


class FfnSkipPolicy(PolicySection):
    """FFN-SkipLLM: FFNs are skipped after one that hardly changed a token's state."""

    name: Literal["ffn-skip"] = "ffn-skip"
    parameters: FfnSkipParameters


class CalmPolicy(PolicySection):
    """CALM: a token exits at the first exit where the model is confident enough."""

    name: Literal["calm"] = "calm"
    parameters: NoParameters = NoParameters()
    confidence: Confidence


class LoopsPolicy(PolicySection):
    """A number of loops for each request (`decoder.loops`)."""

    name: Literal["loops"] = "loops"
    parameters: NoParameters = NoParameters()


BUILT_IN = (GateSkipPolicy, RouterPolicy, LayersPolicy, UnifiedPolicy, FfnSkipPolicy, CalmPolicy, LoopsPolicy)
BUILT_IN_NAMES = tuple(str(section.model_fields["name"].default) for section in BUILT_IN)


def _is_outside(name: str) -> str:
    if name in BUILT_IN_NAMES or not name:
        raise ValueError("a rule of another package needs a name of its own")
    return name


class OutsidePolicy(PolicySection):
    """A keep rule of another package, which exported the bundle. Running the bundle does not need that package."""

    name: Annotated[
        str,
        AfterValidator(_is_outside),
        WithJsonSchema({"type": "string", "not": {"enum": list(BUILT_IN_NAMES)}}),
    ]
    parameters: Mapping[str, JsonValue] = Field(default_factory=dict)


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return name if name in BUILT_IN_NAMES else "outside"


Policy = Annotated[
    Annotated[GateSkipPolicy, Tag("gateskip")]
    | Annotated[RouterPolicy, Tag("router")]
    | Annotated[LayersPolicy, Tag("layers")]
    | Annotated[UnifiedPolicy, Tag("unified")]
    | Annotated[FfnSkipPolicy, Tag("ffn-skip")]
    | Annotated[CalmPolicy, Tag("calm")]
    | Annotated[LoopsPolicy, Tag("loops")]
    | Annotated[OutsidePolicy, Tag("outside")],
    Discriminator(_kind),
]


def gateskip_policy(mode: SelectionMode, branches: Sequence[Branch]) -> GateSkipPolicy:
    """GateSkip's section of the manifest."""
    return GateSkipPolicy(branches=tuple(branches), inputs=(score_input(mode, 0, 1),))


def score_input(mode: SelectionMode, least: float | None, most: float | None) -> RuntimeInput:
    """What a rule with scores reads: a budget by rank, else thresholds. Args: least, most: of the score."""
    if mode == "rank":
        return RuntimeInput(name="budget", least=0, most=1)
    return RuntimeInput(name="thresholds", least=least, most=most)


def _span(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise ValueError("layers must be FIRST-LAST") from None
