"""`gsx.json`: all that a loader must know and check.

Unknown keys and wrong types are refused, so that an edited or foreign file is found at the door. A threshold of
null means minus infinity (keep everything): JSON has no infinities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from gsx_engines.bundle.drafts import DraftEntry
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.bundle.fields import BRANCHES, Branch, Budget, FileName, Scale, Section, Sha256, TensorInfo
from gsx_engines.bundle.policy import Policy, gateskip_policy
from gsx_engines.bundle.selection import CalibrationText, Selection

SCHEMA_VERSION: Literal[1] = 1


class SourceModel(Section):
    """Where the weights come from."""

    model: str
    weights_sha256: Sha256


class DecoderShape(Section):
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


class Gates(Section):
    """The gates of the checkpoint."""

    kind: Literal["vector", "scalar"]
    input: Literal["post_norm", "pre_norm"]
    branches: tuple[Branch, ...]


class Quantization(Section):
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


class KvCache(Section):
    """K and V in 8 bits, where the runtime keeps them so: value = scale x code.

    Args:
        type: of the codes.
        scales: by layer, of keys and of values, one for each K/V head.
        calibration: the text that the ranges were found on, with the exported selection.
    """

    type: Literal["int8"]
    scales: tuple[tuple[tuple[Scale, ...], tuple[Scale, ...]], ...]
    calibration: CalibrationText


class GraphEntry(Section):
    """One ONNX file."""

    file: FileName
    sha256: Sha256
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ops: tuple[str, ...]


class WeightsEntry(Section):
    """The file with the weights of all graphs."""

    file: FileName
    sha256: Sha256
    size_bytes: int


class Manifest(Section):
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
        mode = selection.get("mode") if isinstance(selection, Mapping) else selection.mode
        branches = gates.get("branches") if isinstance(gates, Mapping) else gates.branches if gates else ()
        return {**values, "policy": gateskip_policy("rank" if mode == "rank" else "threshold", branches or ())}

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
        if self.policy is not None and self.policy.needs_gates and self.gates is None:
            raise ValueError(f"the policy {self.policy.name} needs gates")
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
