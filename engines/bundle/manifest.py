"""`gsx.json`: all that a loader must know and check.

Unknown keys and wrong types are refused, so that an edited or foreign file is found at the door. A threshold of
null means minus infinity (keep everything): JSON has no infinities.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from engines.bundle.confidence import Measure
from engines.errors import UsageError

SCHEMA_VERSION: Literal[1] = 1

Branch = Literal["attn", "mlp"]
# The column of a branch wherever a table has one for each.
BRANCHES: tuple[Branch, ...] = ("attn", "mlp")

Threshold = Annotated[
    float,
    BeforeValidator(lambda value: -math.inf if value is None else value),
    PlainSerializer(lambda value: None if value == -math.inf else value, return_type=float | None),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
Table = Sequence[tuple[Threshold, Threshold]]
Budget = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# A file of the bundle itself: a bare name, so that nothing outside the bundle can be meant.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class SourceModel(_Model):
    """Where the weights come from."""

    model: str
    weights_sha256: Sha256


class DecoderShape(_Model):
    """Shape of the decoder; sizes are counts of elements, `windows` in positions (null: unlimited)."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None


class Gates(_Model):
    """The gates of the checkpoint."""

    kind: Literal["vector", "scalar"]
    input: Literal["post_norm", "pre_norm"]
    branches: tuple[Branch, ...]


class CalibrationText(_Model):
    """The text that thresholds were found on."""

    name: str
    sha256: Sha256
    tokens: int


class GridPoint(_Model):
    """One budget of the calibrated grid: thresholds [L][attn, mlp] and the shares that they keep."""

    budget: Budget
    thresholds: tuple[tuple[Threshold, Threshold], ...]
    kept_share: float
    kept: tuple[tuple[float, float], ...]


class Selection(_Model):
    """How kept tokens are chosen, and the exported default.

    Args:
        mode: `threshold` or `rank`.
        budget: the exported default.
        grid: with threshold selection, calibrated budgets in falling order; the first is 1.
        calibration: with threshold selection, the text.
    """

    mode: Literal["threshold", "rank"]
    budget: Budget
    grid: tuple[GridPoint, ...] = ()
    calibration: CalibrationText | None = None

    @model_validator(mode="after")
    def _grid_is_ordered(self) -> Selection:
        budgets = [point.budget for point in self.grid]
        if self.mode == "threshold" and (not budgets or budgets != sorted(set(budgets), reverse=True)):
            raise ValueError("threshold selection needs a grid of distinct budgets in falling order")
        return self

    def thresholds_for(self, budget: float) -> np.ndarray:
        """Thresholds [L, 2] float32 for a budget: calibrated ones, or between two calibrated neighbours.

        Between two budgets the thresholds are interpolated linearly, each branch for itself. Next to budget 1,
        whose thresholds are -inf, the neighbour's are taken (the share kept is then a little low).

        Raises:
            UsageError: a budget below the grid or not in (0, 1].
        """
        check_budget(budget)
        lowest = self.grid[-1]
        if budget < lowest.budget:
            raise UsageError(
                f"budget {budget:g} lies below the calibrated grid",
                expected=f"{lowest.budget:g} to 1",
                found=f"{budget:g}",
                todo=f"export again with --budget {budget:g}: the grid then reaches it",
            )
        for upper, lower in zip(self.grid, self.grid[1:], strict=False):
            if lower.budget < budget < upper.budget:
                high, low = _array(upper.thresholds), _array(lower.thresholds)
                share = (upper.budget - budget) / (upper.budget - lower.budget)
                with np.errstate(invalid="ignore"):
                    between = high + np.float32(share) * (low - high)
                return np.where(np.isneginf(high), low, between).astype(np.float32)
        point = next(p for p in self.grid if p.budget == budget)
        return _array(point.thresholds)


class RuntimeInput(_Model):
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


class TestedThreshold(_Model):
    """An exit threshold that was tried: mean risk, p-value of "above the tolerance", and share of branches that ran."""

    threshold: float
    mean_risk: float
    p_value: float
    accepted: bool
    kept_share: float


class Guarantee(_Model):
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


class Confidence(_Model):
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


class Policy(_Model):
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


class Quantization(_Model):
    """What runs in 8 bits.

    Args:
        scheme: `int8` and `fp8` (E4M3) for weights and activations, `int8-weights` for weights alone. Weights have a
            scale for each output channel, activations one for the tensor; zero-points are 0. The head's weights are
            INT8, its input is not quantized, nor are those of the layers behind the first one that stays high (FP8); an
            embedding is INT8 with a scale for each row; the weights of vector gates are INT8, their products float32.
        smoothing: SmoothQuant's alpha; 0: none.
        products: quantized matrix products of the graph `model`.
        kept_high: matrices that were left in high precision: linear layers, vector gates, and a table where embedding
            and head have one each (`embed_tokens`, `lm_head`). A table that they share always is.
        budget: at which the ranges of activations were found; null for weights alone and without gates.
        calibration: the text that they were found on; null for weights alone.
    """

    scheme: Literal["int8", "int8-weights", "fp8"]
    smoothing: float
    products: int
    kept_high: tuple[str, ...]
    budget: Budget | None
    calibration: CalibrationText | None


class KvCache(_Model):
    """K and V in 8 bits, where the runtime keeps them so: value = scale x code.

    Args:
        type: of the codes.
        scales: by layer, of keys and of values, one for each K/V head.
        calibration: the text that the ranges were found on, with the exported selection.
    """

    type: Literal["int8"]
    scales: tuple[tuple[tuple[Scale, ...], tuple[Scale, ...]], ...]
    calibration: CalibrationText


class TensorInfo(_Model):
    """An input or output of a graph; a dynamic axis has a name in place of a size."""

    name: str
    type: str
    shape: tuple[int | str, ...]


class GraphEntry(_Model):
    """One ONNX file."""

    file: FileName
    sha256: Sha256
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ops: tuple[str, ...]


class WeightsEntry(_Model):
    """The file with the weights of all graphs."""

    file: FileName
    sha256: Sha256
    size_bytes: int


class ExitDraft(_Model):
    """Draft with the first `layer` layers, final norm and head; the graphs `draft` and `verify` are split there."""

    kind: Literal["exit"] = "exit"
    layer: int

    def __str__(self) -> str:
        return f"exit:{self.layer}"


class BudgetDraft(_Model):
    """Draft with the whole depth at a lower budget."""

    kind: Literal["budget"] = "budget"
    budget: Budget

    def __str__(self) -> str:
        return f"budget:{self.budget:g}"


class LayersDraft(_Model):
    """Draft without some gated branches (layer, branch)."""

    kind: Literal["layers"] = "layers"
    skip: tuple[tuple[int, Branch], ...]

    def __str__(self) -> str:
        return "layers:" + places_text(self.skip)


def places_text(places: Collection[tuple[int, Branch]]) -> str:
    """A set of branches as `layer_sets.parse_places` reads it: neighbours that name the same are a range."""
    named = {layer: tuple(b for b in BRANCHES if (layer, b) in places) for layer, _ in sorted(places)}
    parts = []
    # In a range, layer less place is the same.
    for (branches, _), group in groupby(enumerate(named), lambda at: (named[at[1]], at[1] - at[0])):
        layers = [layer for _, layer in group]
        ends = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(ends if branches == BRANCHES else f"{ends}.{branches[0]}")
    return ",".join(parts)


DraftKind = Annotated[ExitDraft | BudgetDraft | LayersDraft, Field(discriminator="kind")]


DraftTokens = Annotated[int, Field(ge=1)]


class DraftMeasurement(_Model):
    """What one draft gave when it was tried (`--draft auto`, `--draft layers:auto`).

    Args:
        draft: what was left out.
        length: tokens drafted before a verification: the best one found.
        acceptance: share of drafted tokens that were right, those behind a wrong one not counted.
        tokens_per_second, plain_tokens_per_second: with this draft and without one, taking turns.
    """

    draft: DraftKind
    length: DraftTokens
    acceptance: float
    tokens_per_second: float
    plain_tokens_per_second: float


class DraftEntry(_Model):
    """How this bundle drafts, unless another way is asked for.

    Args:
        draft: what is left out.
        length: tokens drafted before the first verifications, until the loop knows better; null: its own choice.
        measured: where the draft was chosen by measuring (`auto`, `layers:auto`), what was seen of each candidate.
    """

    draft: DraftKind
    length: DraftTokens | None = None
    measured: tuple[DraftMeasurement, ...] = ()


class Sizes(NamedTuple):
    """A dynamic axis of an engine: the least, what it is fastest at, the most."""

    least: int
    usual: int
    most: int


class EngineProfile(_Model):
    """Calls that an engine takes: sequences, tokens of each in the call, columns of the cache that are read."""

    name: str
    batch: Sizes
    tokens: Sizes
    window: Sizes

    @model_validator(mode="after")
    def _in_order(self) -> EngineProfile:
        for axis in (self.batch, self.tokens, self.window):
            if not 1 <= axis.least <= axis.usual <= axis.most:
                raise ValueError(f"profile {self.name}: {tuple(axis)} is not least <= usual <= most")
        return self


KvLayout = Literal["in-place", "growing"]


class PluginLibrary(_Model):
    """The plugin library that an engine was built with and must be run with."""

    sha256: Sha256
    source_hash: str


class EngineGraph(_Model):
    """An engine of one graph.

    Args:
        file, sha256, size_bytes: of the engine.
        graph_sha256, weights_sha256: of what it was built from.
        forms: op of domain gsx -> what became of it: `plugin`, `body`, `rows`, `mask` or `all` (docs/engines.md).
        layers: type of TensorRT layer -> how many there were before TensorRT fused them.
        products: type that the engine computes a matrix product of the graph in -> how many.
        widened: weights of the products that are quantized in the graph, and that the engine computes in a wider type.
        inputs, outputs: of the engine, which differ from the graph's.
        peak_bytes: most memory that building took.
    """

    file: FileName
    sha256: Sha256
    size_bytes: int
    graph_sha256: Sha256
    weights_sha256: Sha256
    forms: Mapping[str, Literal["plugin", "body", "rows", "mask", "all"]]
    layers: Mapping[str, int]
    products: Mapping[str, int] = Field(default_factory=dict)
    widened: tuple[str, ...] = ()
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    build_seconds: float
    peak_bytes: int


class EngineEntry(_Model):
    """One set of engines, as in `gsx.json` and in `engines/<name>/engine.json`.

    Args:
        tensorrt_version: of the builder; the runtime must have the same.
        targets: compute capabilities, e.g. "89".
        platform: operating system and processor.
        gpu: the GPU that it was built on, where the backend ties an engine to one.
        kv_layout: `in-place`: K and V are written into buffers of a fixed length; `growing`: they come in as `past` and
            go out as `present`, as in the graph. gsx runs the first; the second is for other people's programs.
        capacity: columns of the K/V buffers; the most tokens that K and V may grow to.
        plugins: None where no plugin is used.
    """

    schema_version: Literal[1]
    backend: Literal["tensorrt", "tensorrt-rtx"]
    tensorrt_version: str
    targets: tuple[str, ...]
    platform: str
    gpu: str | None
    precision: Literal["fp32", "fp16", "bf16"]
    kv_layout: KvLayout = "in-place"
    capacity: int
    profiles: tuple[EngineProfile, ...]
    plugins: PluginLibrary | None
    graphs: Mapping[str, EngineGraph]


class Manifest(_Model):
    """The whole of `gsx.json`."""

    schema_version: Literal[1]
    gsx_version: str
    tools: Mapping[str, str]
    source: SourceModel
    decoder: DecoderShape
    gates: Gates | None
    selection: Selection | None
    policy: Policy | None = None
    kv_policy: Literal["compute", "copy", "none"]
    precision: Literal["fp32", "fp16", "bf16"]
    quantization: Quantization | None = None
    kv_cache: KvCache | None = None
    graphs: Mapping[str, GraphEntry]
    weights: WeightsEntry
    draft: DraftEntry | None = None

    engines: Mapping[FileName, EngineEntry] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_gateskip(cls, values: Any) -> Any:
        """A bundle with a selection and no policy is one of GateSkip, from before there were others."""
        if not isinstance(values, Mapping) or not values.get("selection") or values.get("policy"):
            return values
        gates, selection = values.get("gates"), values["selection"]
        mode = str(selection.get("mode") if isinstance(selection, Mapping) else selection.mode)
        branches = gates.get("branches") if isinstance(gates, Mapping) else gates.branches if gates else ()
        return {**values, "policy": gateskip_policy(mode, branches or ())}

    @property
    def skippable(self) -> tuple[Branch, ...]:
        """Branches that the keep rule may skip; empty for a dense bundle."""
        return self.policy.branches if self.policy else ()

    @property
    def rounds(self) -> bool:
        """Whether something is in 8 bits, so that quality is the measure, and not closeness of numbers."""
        return self.quantization is not None or self.kv_cache is not None

    @property
    def hides_skipped(self) -> bool:
        """Whether a token that was skipped in a layer has no K and V there, and kept ones must not see it."""
        return self.kv_policy == "none" and self.selection is not None

    @property
    def skippable_places(self) -> list[tuple[int, Branch]]:
        """(layer, branch) of every branch that the keep rule may skip, in the graph's order."""
        if self.policy is None:
            return []
        layers = range(self.decoder.num_layers) if self.policy.layers is None else self.policy.layers
        return [(layer, branch) for layer in layers for branch in BRANCHES if branch in self.policy.branches]

    @model_validator(mode="after")
    def _parts_fit(self) -> Manifest:
        reads = {one.name for one in self.policy.inputs} if self.policy else set()
        if (self.selection is not None) != bool(reads & {"thresholds", "budget"}):
            raise ValueError("a selection and a policy that reads thresholds or a budget go together")
        if self.policy is not None and self.policy.name == "gateskip" and self.gates is None:
            raise ValueError("the policy gateskip needs gates")
        exit_threshold = self.policy.input("exit_threshold") if self.policy else None
        if self.policy is not None and exit_threshold is not None:
            bounds = (exit_threshold.least, exit_threshold.most)
            if self.policy.confidence is None or None in bounds:
                raise ValueError("a policy that reads an exit threshold needs its range and the exported one")
        for layer in (self.policy.layers or ()) if self.policy else ():
            if not 0 <= layer < self.decoder.num_layers:
                raise ValueError(f"the policy reaches layer {layer} of {self.decoder.num_layers}")
        rows = {len(point.thresholds) for point in self.selection.grid} if self.selection else set()
        if rows - {self.decoder.num_layers}:
            raise ValueError(f"thresholds are for {sorted(rows)} layers, the model has {self.decoder.num_layers}")
        if self.kv_cache is not None:
            heads = [len(scales) for layer in self.kv_cache.scales for scales in layer]
            if heads != [self.decoder.num_kv_heads] * (2 * self.decoder.num_layers):
                raise ValueError("kv_cache has not a scale for each K/V head of each layer")
        wanted = {"model"}
        if self.draft is not None and self.draft.draft.kind == "exit":
            wanted |= {"draft", "verify"}
            if not 0 < self.draft.draft.layer < self.decoder.num_layers:
                raise ValueError(f"the draft exits after {self.draft.draft.layer} of {self.decoder.num_layers} layers")
        if wanted - set(self.graphs):
            raise ValueError("graphs lacks " + ", ".join(sorted(wanted - set(self.graphs))))
        return self


def gateskip_policy(mode: str, branches: Sequence[Branch]) -> Policy:
    """GateSkip's section of the manifest; mode: of the selection."""
    read = (
        RuntimeInput(name="budget", least=0, most=1)
        if mode == "rank"
        else RuntimeInput(name="thresholds", least=0, most=1)
    )
    return Policy(name="gateskip", branches=tuple(branches), inputs=(read,))


def check_budget(budget: float) -> None:
    """Refuse what is not a share above 0 and up to 1."""
    if not (isinstance(budget, int | float) and math.isfinite(budget) and 0 < budget <= 1):
        raise UsageError("budget is not a share", expected="a number above 0 and at most 1", found=repr(budget))


def _array(table: Table) -> np.ndarray:
    return np.asarray(table, dtype=np.float32)
