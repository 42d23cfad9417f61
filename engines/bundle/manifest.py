"""`gsx.json`: all that a loader must know and check.

Unknown keys and wrong types are refused, so that an edited or foreign file is found at the door. A threshold of
null means minus infinity (keep everything): JSON has no infinities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

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


class Quantization(_Model):
    """What runs in 8 bits.

    Args:
        scheme: `int8` and `fp8` (E4M3) for weights and activations, `int8-weights` for weights alone. Weights have a
            scale for each output channel, activations one for the tensor; zero-points are 0.
        smoothing: SmoothQuant's alpha; 0: none.
        products: quantized matrix products of the graph `model`.
        kept_high: linear layers that were left in full precision, besides gates, embedding and head.
        budget: at which the ranges of activations were found; null for weights alone and without gates.
        calibration: the text that they were found on; null for weights alone.
    """

    scheme: Literal["int8", "int8-weights", "fp8"]
    smoothing: float
    products: int
    kept_high: tuple[str, ...]
    budget: Budget | None
    calibration: CalibrationText | None


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
        """As `parse_draft` reads it: neighbours that leave out the same are a range."""
        left_out = {layer: tuple(b for b in BRANCHES if (layer, b) in self.skip) for layer, _ in sorted(self.skip)}
        parts = []
        # In a range, layer less place is the same.
        for (branches, _), group in groupby(enumerate(left_out), lambda at: (left_out[at[1]], at[1] - at[0])):
            layers = [layer for _, layer in group]
            ends = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            parts.append(ends if branches == BRANCHES else f"{ends}.{branches[0]}")
        return "layers:" + ",".join(parts)


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
        capacity: columns of the K/V buffers.
        plugins: None where no plugin is used.
    """

    schema_version: Literal[1]
    backend: Literal["tensorrt", "tensorrt-rtx"]
    tensorrt_version: str
    targets: tuple[str, ...]
    platform: str
    gpu: str | None
    precision: Literal["fp32", "fp16", "bf16"]
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
    kv_policy: Literal["compute", "copy"]
    precision: Literal["fp32", "fp16", "bf16"]
    quantization: Quantization | None = None
    graphs: Mapping[str, GraphEntry]
    weights: WeightsEntry
    draft: DraftEntry | None = None

    engines: Mapping[FileName, EngineEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _selection_fits_gates(self) -> Manifest:
        if (self.gates is None) != (self.selection is None):
            raise ValueError("gates and selection go together")
        rows = {len(point.thresholds) for point in self.selection.grid} if self.selection else set()
        if rows - {self.decoder.num_layers}:
            raise ValueError(f"thresholds are for {sorted(rows)} layers, the model has {self.decoder.num_layers}")
        wanted = {"model"}
        if self.draft is not None and self.draft.draft.kind == "exit":
            wanted |= {"draft", "verify"}
            if not 0 < self.draft.draft.layer < self.decoder.num_layers:
                raise ValueError(f"the draft exits after {self.draft.draft.layer} of {self.decoder.num_layers} layers")
        if wanted - set(self.graphs):
            raise ValueError("graphs lacks " + ", ".join(sorted(wanted - set(self.graphs))))
        return self


def check_budget(budget: float) -> None:
    """Refuse what is not a share above 0 and up to 1."""
    if not (isinstance(budget, int | float) and math.isfinite(budget) and 0 < budget <= 1):
        raise UsageError("budget is not a share", expected="a number above 0 and at most 1", found=repr(budget))


def _array(table: Table) -> np.ndarray:
    return np.asarray(table, dtype=np.float32)
