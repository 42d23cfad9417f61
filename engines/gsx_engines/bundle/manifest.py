"""`gsx.json`: everything that a loader must know and check.

Unknown keys and wrong types are refused, so that an edited or foreign file is detected when it is opened. A threshold
of null means minus infinity (keep everything), since JSON has no infinities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from gsx_engines.bundle.drafts import DraftEntry
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.bundle.fields import Budget, FileName, Scale, Section, Sha256, SparseSection, TensorInfo
from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.policy import Policy, gateskip_policy
from gsx_engines.bundle.selection import CalibrationText, Selection
from gsx_engines.bundle.tensor_names import passing, past, present
from gsx_engines.bundle.words import BRANCHES, Branch, KvPolicy, Precision

SCHEMA_VERSION: Literal[1] = 1


class SourceModel(SparseSection):
    """Where the weights come from.

    Args:
        model: the name that the user gave.
        weights_sha256: over the bytes of the weight files.
        notes: what was unusual about the model's files and how they were understood, each a sentence. A manifest
            without notes does not have the key, like those of bundles that were written before it was there.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"notes"})

    model: str
    weights_sha256: Sha256
    notes: tuple[str, ...] = ()


class DecoderShape(SparseSection):
    """Shape of the decoder. Sizes are numbers of elements; `windows` are attention windows in tokens (null: none).

    Args: loops: how the layers of a looped model run; then `num_layers` counts visits, and all that is by layer is by
        visit. Other manifests do not have the key.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"loops"})

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
    loops: Loops | None = None

    @property
    def stored_layers(self) -> int:
        """How many layers have weights."""
        return self.num_layers if self.loops is None else self.loops.layers

    @property
    def num_caches(self) -> int:
        """How many K/V caches there are: one for each layer, in a looped model for each visit or for each layer."""
        return self.loops.layers if self.loops is not None and self.loops.share_caches else self.num_layers

    def cache_of(self, layer: int) -> int:
        """The number of a layer's K/V cache."""
        return layer if self.loops is None else self.loops.cache_of(layer)

    def caches_of(self, layers: Iterable[int]) -> list[int]:
        """The K/V caches of some layers, each once, ascending."""
        return sorted({self.cache_of(layer) for layer in layers})

    def past_of(self, layer: int, kind: str) -> str:
        """Name of the graph's input with the K or V that a layer's tokens see of tokens before the call."""
        return past(self.cache_of(layer), kind)

    def present_of(self, layer: int, kind: str) -> str:
        """Name of the value with all K or V that a layer's tokens see: an output, unless a later visit replaces it."""
        cache = self.cache_of(layer)
        leaves = self.loops is None or self.loops.leaves_cache(layer)
        return present(cache, kind) if leaves else passing(cache, kind, layer)

    @property
    def left_caches(self) -> dict[int, int]:
        """Layer -> its cache, where its K and V stay in it: no later visit replaces them."""
        kept = [n for n in range(self.num_layers) if self.loops is None or self.loops.leaves_cache(n)]
        return {layer: self.cache_of(layer) for layer in kept}


class Gates(Section):
    """The gates of the checkpoint."""

    kind: Literal["vector", "scalar"]
    input: Literal["post_norm", "pre_norm"]
    branches: tuple[Branch, ...]


# How a model is quantized; exporter/gsx_exporter/quantization/scheme.py has a row for each.
SchemeName = Literal["int8", "int8-weights", "int4", "fp8"]
# Schemes whose codes are floating-point (E4M3): ONNX Runtime only simulates them on a CPU, and not every GPU has them.
_FLOAT8: frozenset[SchemeName] = frozenset(("fp8",))
_WEIGHTS_ONLY: frozenset[SchemeName] = frozenset(("int8-weights", "int4"))


class Interval(Section):
    """A mean over tokens and its 95 % confidence interval."""

    value: float
    low: float
    high: float


class MeasuredQuality(Section):
    """What rounding cost when the bundle was exported, against float32, at the exported budget.

    Args:
        text: what it was measured on: after the calibration text, if there is any.
        divergence: KL divergence of the next-token distribution, in nats.
        differing: share of tokens whose most likely next token is another.
        perplexity_increase: relative; below 0 if it fell.
        flipped: share of keep/skip decisions that flipped; null without decisions.
        verdict: `within limits`, `over limits`, or `not judged`: the model itself predicts the text no better than the
            frequencies of its tokens do, so that it has nothing to lose.
    """

    text: CalibrationText
    divergence: Interval
    differing: Interval
    perplexity_increase: Interval
    flipped: float | None
    verdict: Literal["within limits", "over limits", "not judged"]


class Quantization(Section):
    """What runs in 8 or 4 bits.

    Args:
        scheme: `int8` and `fp8` (E4M3) quantize weights and activations, `int8-weights` and `int4` only weights. Where
            activations are quantized, weights have one scale for each output channel and activations one for the whole
            tensor; else weights are in blocks of 32 inputs with a scale each, and in 4 bits with a zero-point. A head
            and an embedding have INT8 weights in blocks of 32 channels of a row of the vocabulary (one scale for a row
            if 32 does not divide the width); vector gates have INT8 weights and float32 products.
        smoothing: SmoothQuant's alpha; 0: no smoothing.
        products: number of quantized matrix products in the graph `model`.
        kept_high: matrices that stay in high precision: linear layers, vector gates, and `embed_tokens` (the table that
            it shares with the head, if there is only one) or `lm_head`.
        weights_only: linear layers of which only the weights are quantized, to INT8 in blocks, although the scheme has
            other weights or quantizes activations: they would lose too much.
        budget: the budget at which the ranges of activations were measured; null if only weights are quantized, and
            without gates.
        calibration: the text that ranges were measured and codes were chosen on; null if neither was.
        measured: what it cost; null in a bundle of a version that did not measure.
    """

    scheme: SchemeName
    smoothing: float
    products: int
    kept_high: tuple[str, ...]
    weights_only: tuple[str, ...] = ()
    budget: Budget | None
    calibration: CalibrationText | None
    measured: MeasuredQuality | None = None

    @property
    def is_float8(self) -> bool:
        """Whether the codes are FP8."""
        return self.scheme in _FLOAT8

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized too, not only weights."""
        return self.scheme not in _WEIGHTS_ONLY


class KvCache(Section):
    """K and V in 8 bits, for runtimes that store them that way: value = scale x code.

    Args:
        type: of the codes.
        scales: for each layer, those of the keys and those of the values, one for each K/V head.
        calibration: the text that the ranges were measured on, with the exported selection.
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


class ChatTemplateEntry(Section):
    """The model's chat template.

    Args:
        file: of the bundle; the whole file, or the entry `chat_template` in `tokenizer_config.json`.
        sha256: of the template's text in UTF-8.
    """

    file: FileName
    sha256: Sha256


class WeightsEntry(Section):
    """The file with the weights of all graphs."""

    file: FileName
    sha256: Sha256
    size_bytes: int


class Manifest(SparseSection):
    """The whole of `gsx.json`. A bundle without a chat template does not have the key, like those of 0.1.0."""

    sparse: ClassVar[frozenset[str]] = frozenset({"chat_template"})

    schema_version: Literal[1]
    gsx_version: str
    tools: Mapping[str, str]
    source: SourceModel
    decoder: DecoderShape
    gates: Gates | None
    selection: Selection | None
    policy: Policy | None = None
    kv_policy: KvPolicy
    precision: Precision
    quantization: Quantization | None = None
    kv_cache: KvCache | None = None
    graphs: Mapping[str, GraphEntry]
    weights: WeightsEntry
    draft: DraftEntry | None = None
    chat_template: ChatTemplateEntry | None = None

    engines: Mapping[FileName, EngineEntry] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_gateskip(cls, values: Any) -> Any:
        """Give a bundle without a section `policy` the section that it implies.

        The first bundles had no such section, since GateSkip was the only keep rule: a selection implies GateSkip.
        """
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
        """Whether anything is in 8 bits, so that parity is judged by quality, not by how close the numbers are."""
        return self.quantization is not None or self.kv_cache is not None

    @property
    def hides_skipped(self) -> bool:
        """Whether a token skipped in a layer has no K and V there, so that kept tokens must not attend to it."""
        return self.kv_policy == "none" and self.selection is not None

    @property
    def depends_on_call(self) -> bool:
        """Whether what a token gives depends on which tokens are in its call: with selection by rank, and where the
        loops of a looped model share a cache."""
        ranks = self.selection is not None and self.selection.mode == "rank"
        return ranks or (self.decoder.loops is not None and self.decoder.loops.share_caches)

    @property
    def skippable_places(self) -> list[tuple[int, Branch]]:
        """(layer, branch) of every branch that the keep rule may skip, in the graph's order."""
        return self.skippable_in(range(self.decoder.num_layers))

    def skippable_in(self, layers: range) -> list[tuple[int, Branch]]:
        """(layer, branch) of every branch that the keep rule may skip in some layers, in the graph's order."""
        if self.policy is None:
            return []
        reached = layers if self.policy.layers is None else [layer for layer in self.policy.layers if layer in layers]
        return [(layer, branch) for layer in reached for branch in BRANCHES if branch in self.policy.branches]

    def layers_of(self, graph: str) -> range:
        """The layers in a graph of the bundle: `model`, or the halves `draft` and `verify`."""
        depth = self.decoder.num_layers
        if graph == "model":
            return range(depth)
        assert self.draft is not None
        assert self.draft.draft.kind == "exit"
        split = self.draft.draft.layer
        return range(split) if graph == "draft" else range(split, depth)

    def by_sequence(self, name: str) -> bool:
        """Whether a run-time input has a value for each sequence. Thresholds in bundles of 0.1.0 have one for all."""
        return any(value.name == name and value.shape[:1] == ("batch",) for value in self.graphs["model"].inputs)

    @property
    def exit_state(self) -> dict[str, tuple[int | str, ...]]:
        """What passes from `draft` to `verify`: names and axes; empty without an exit.

        `exit_hidden` [B, S, H]; under the K/V policy `copy` also `exit_key` and `exit_value` [B, K/V heads, S, D]; and
        what the keep rule carries from layer to layer, [B, S, 1] each.
        """
        if not {"draft", "verify"} <= set(self.graphs):
            return {}
        given = {value.name for value in self.graphs["draft"].outputs}
        return {value.name: value.shape for value in self.graphs["verify"].inputs if value.name in given}

    @model_validator(mode="after")
    def _parts_fit(self) -> Manifest:
        reads = {read.name for read in self.policy.inputs} if self.policy else set()
        if (self.selection is not None) != bool(reads & {"thresholds", "budget"}):
            raise ValueError("a selection requires a policy that reads thresholds or a budget, and the other way round")
        if self.policy is not None and self.policy.needs_gates and self.gates is None:
            raise ValueError(f"the policy {self.policy.name} needs gates")
        loops = self.decoder.loops
        if loops is not None and len(loops.visits) != self.decoder.num_layers:
            raise ValueError(f"its loops visit {len(loops.visits)} layers, the model has {self.decoder.num_layers}")
        if "loops" in reads and loops is None:
            raise ValueError("the policy reads a number of loops, and the decoder has none")
        if loops is not None and loops.share_caches and self.policy is not None and self.kv_policy != "copy":
            raise ValueError(f"its loops share a cache, which needs the K/V policy copy, not {self.kv_policy}")
        exit_threshold = self.policy.input("exit_threshold") if self.policy else None
        if self.policy is not None and exit_threshold is not None:
            bounds = (exit_threshold.least, exit_threshold.most)
            if self.policy.confidence is None or None in bounds:
                raise ValueError("a policy that reads an exit threshold needs its range and its exported value")
        for layer in (self.policy.layers or ()) if self.policy else ():
            if not 0 <= layer < self.decoder.num_layers:
                raise ValueError(f"the policy names layer {layer}, the model has {self.decoder.num_layers}")
        rows = {len(point.thresholds) for point in self.selection.grid} if self.selection else set()
        if rows - {self.decoder.num_layers}:
            raise ValueError(f"thresholds are for {sorted(rows)} layers, the model has {self.decoder.num_layers}")
        if self.kv_cache is not None:
            heads = [len(scales) for layer in self.kv_cache.scales for scales in layer]
            if heads != [self.decoder.num_kv_heads] * (2 * self.decoder.num_layers):
                raise ValueError("kv_cache does not have one scale for each K/V head of each layer")
        wanted = {"model"}
        if self.draft is not None and self.draft.draft.kind == "exit":
            wanted |= {"draft", "verify"}
            if not 0 < self.draft.draft.layer < self.decoder.num_layers:
                raise ValueError(f"the draft exits after {self.draft.draft.layer} of {self.decoder.num_layers} layers")
        if wanted - set(self.graphs):
            raise ValueError("graphs lacks " + ", ".join(sorted(wanted - set(self.graphs))))
        return self
