"""Manifests of the toy models, each with the engine entry `toy`, and those for steps with more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter

from gsx_engines.bundle.drafts import DraftEntry, ExitDraft
from gsx_engines.bundle.engine_entry import EngineEntry, EngineGraph, EngineProfile, KvLayout, Sizes
from gsx_engines.bundle.fields import TensorInfo
from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.manifest import DecoderShape, Gates, GraphEntry, Manifest, SourceModel, WeightsEntry
from gsx_engines.bundle.policy import Policy, gateskip_policy
from gsx_engines.bundle.selection import GridPoint, Selection
from gsx_engines.bundle.words import Branch
from tests.vectors.toy import LIKELY, mix

LAYERS, EXIT, VOCABULARY, CONTEXT, END = 6, 3, 97, 100, 2
# A layer before, two that run twice, and one after: six visits.
LOOPS = Loops(before=1, looped=2, after=1, most=2, default=2)
# The layers of a rule that does not apply to every layer.
ROUTED = (1, 3, 4)
HASH = "0" * 64
# Budget -> the smallest score that is kept, in 256ths; None: any.
GRID = {1.0: None, 0.8: 51, 0.5: 127, 0.3: 180}
# Name -> tokens (least, usual, most) and sequences of each profile.
PROFILES = {
    "one": [("any", (1, 8, 64), (1, 1, 4))],
    "two": [("prefill", (2, 8, 16), (1, 1, 4)), ("decode", (1, 1, 1), (1, 1, 4))],
    "verify": [("prefill", (1, 8, 24), (1, 1, 4)), ("verify", (2, 4, 6), (1, 1, 4)), ("decode", (1, 1, 1), (1, 1, 4))],
}
# Name -> what differs from a gated model of K/V policy `compute` that drafts with its exit (`toy_manifest`).
MODELS: dict[str, dict[str, Any]] = {
    "gated": {},
    "copy": {"kv_policy": "copy", "profiles": "two"},
    "one branch": {"branches": ["mlp"], "profiles": "verify"},
    "dense": {"branches": [], "profiles": "two"},
    "rank, counted by the host": {"mode": "rank", "draft": None, "counted": True},
    "rank": {"mode": "rank", "draft": None},
    "layers": {"rule": "layers"},
    "layers, copy": {"rule": "layers", "kv_policy": "copy", "profiles": "two"},
    "calm": {"rule": "calm", "kv_policy": "copy"},
    "loops": {"rule": "loops", "draft": None},
    "some layers": {"rule": "router", "profiles": "verify"},
    "rank in pieces": {"mode": "rank", "draft": None, "profiles": "two"},
    "short": {"capacity": 32},
    "old engines": {"told": False, "draft": None},
    "gated, one table": {"by_sequence": False, "draft": None},
    "steps": {"steps": [(1, 1), (1, 4), (3, 1)]},
    "steps, sets of layers": {"rule": "layers", "steps": [(1, 1), (3, 1)]},
    "calm, one threshold": {"rule": "calm", "kv_policy": "copy", "by_sequence": False, "draft": None},
    "three ends": {"mode": "rank", "draft": None, "counted": True, "ends": (END, 60, 17)},
}

RuleName = Literal["gateskip", "router", "layers", "calm", "loops"]
Mode = Literal["threshold", "rank"]
# Names and shapes of inputs or outputs.
Shapes = dict[str, list[int | str]]


def toy_manifest(
    *,
    kv_policy: Literal["compute", "copy"] = "compute",
    branches: Sequence[Branch] = ("attn", "mlp"),
    rule: RuleName = "gateskip",
    mode: Mode = "threshold",
    draft: int | None = EXIT,
    counted: bool = False,
    profiles: str = "one",
    capacity: int = CONTEXT,
    ends: Sequence[int] = (END,),
    by_sequence: bool = True,
    told: bool = True,
    steps: Sequence[tuple[int, int]] = (),
) -> Manifest:
    """The manifest of a toy model.

    Args:
        branches: the branches that the rule may skip; empty for a dense model.
        mode: the selection's mode, with gates or routers.
        draft: the exit that drafts.
        counted: by rank, whether the host counts how many tokens are kept, and the engine reads that.
        profiles: the engine's profiles, a key of `PROFILES`.
        capacity: capacity of the engine's K/V buffers.
        ends: the tokens that end a text.
        by_sequence: whether thresholds have a value for each sequence; False for those of 0.1.0.
        told: whether the engines tell what each token kept; False for those of 0.1.0.
        steps: sequences, and tokens of each, of engines for calls of one size beside those for all calls.
    """
    gated = bool(branches) and rule == "gateskip"
    policy = toy_policy(rule, branches, mode) if branches else None
    passed: Shapes = {"exit_hidden": ["batch", "sequence", 1]}
    if kv_policy == "copy":
        passed |= {f"exit_{kv}": ["batch", 1, "sequence", 1] for kv in ("key", "value")}
    graphs = {"model": range(LAYERS)}
    if draft is not None:
        graphs |= {"draft": range(draft), "verify": range(draft, LAYERS)}
    reads = rule_inputs(policy, by_sequence)
    reached = policy.layers if policy and policy.layers else range(LAYERS)
    engines = {}
    for name, layers in graphs.items():
        chosen = sum(layer in reached for layer in layers) * len(branches)
        inputs = {**engine_inputs(reads, counted=counted), **(passed if name == "verify" else {})}
        counts: Shapes = {"kept": [chosen]} if branches else {}
        if branches and mode == "threshold" and told:
            counts["kept_by_token"] = ["batch", "sequence"]
        outputs = {**(passed if name == "draft" else {}), **counts}
        engines[name] = engine_graph(name, layers, capacity, inputs, outputs)
    return Manifest(
        schema_version=1,
        gsx_version="0",
        tools={},
        kv_policy=kv_policy,
        precision="fp32",
        source=SourceModel(model="toy", weights_sha256=HASH),
        decoder=DecoderShape(
            family="toy",
            vocab_size=VOCABULARY,
            hidden_size=1,
            num_layers=LAYERS,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            max_positions=CONTEXT,
            windows=(None,) * LAYERS,
            bos_id=None,
            eos_ids=tuple(ends),
            pad_id=None,
            loops=LOOPS if rule == "loops" else None,
        ),
        gates=Gates(kind="scalar", input="post_norm", branches=tuple(branches)) if gated else None,
        selection=toy_selection(mode) if gated or rule == "router" else None,
        policy=policy,
        graphs={
            name: GraphEntry(
                file=f"{name}.onnx",
                sha256=HASH,
                inputs=tensors({**reads, **(passed if name == "verify" else {})}),
                outputs=tensors(passed if name == "draft" else {}),
                ops=(),
            )
            for name in graphs
        },
        weights=WeightsEntry(file="weights.bin", sha256=HASH, size_bytes=0),
        draft=None if draft is None else DraftEntry(draft=ExitDraft(layer=draft), length=3),
        engines={
            "toy": engine_entry(
                capacity,
                engines,
                [
                    EngineProfile(
                        name=name,
                        batch=Sizes(*batch),
                        tokens=Sizes(*tokens),
                        window=Sizes(1, min(64, capacity), capacity),
                    )
                    for name, tokens, batch in PROFILES[profiles]
                ],
            ),
            **{f"toy-step-{batch}x{tokens}": step_entry(capacity, engines, batch, tokens) for batch, tokens in steps},
        },
    )


def engine_entry(
    capacity: int,
    graphs: Mapping[str, EngineGraph],
    profiles: Sequence[EngineProfile],
    kv_layout: KvLayout = "in-place",
) -> EngineEntry:
    """The record of a set of engines."""
    return EngineEntry(
        schema_version=1,
        backend="tensorrt-rtx",
        tensorrt_version="0",
        targets=("89",),
        platform="any",
        gpu=None,
        precision="fp32",
        kv_layout=kv_layout,
        capacity=capacity,
        plugins=None,
        profiles=tuple(profiles),
        graphs=graphs,
    )


def step_entry(capacity: int, graphs: Mapping[str, EngineGraph], batch: int, tokens: int) -> EngineEntry:
    """The record of engines for calls of one size: those for all calls with numbers in place of the axes' names."""
    sizes: dict[int | str, int] = {"batch": batch, "sequence": tokens, "window": capacity, "logits_columns": tokens}

    def fixed(values: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
        return tuple(
            one.model_copy(update={"shape": tuple(sizes.get(axis, axis) for axis in one.shape)}) for one in values
        )

    one_size = [Sizes(size, size, size) for size in (batch, tokens, capacity)]
    profile = EngineProfile(name="step", batch=one_size[0], tokens=one_size[1], window=one_size[2])
    likeliest: Shapes = {
        "likely_ids": [batch, tokens, LIKELY],
        "likely_logits": [batch, tokens, LIKELY],
        "likely_total": [batch, tokens],
    }
    made = {
        name: graph.model_copy(
            update={"inputs": fixed(graph.inputs), "outputs": (*fixed(graph.outputs), *tensors(likeliest))}
        )
        for name, graph in graphs.items()
    }
    return engine_entry(capacity, made, [profile], "step")


def toy_policy(rule: RuleName, branches: Sequence[Branch], mode: Mode) -> Policy:
    """The manifest's section of a keep rule."""
    gateskip = gateskip_policy(mode, branches)
    if rule == "gateskip":
        return gateskip
    full_until = {"name": "full_until", "least": 0, "most": None, "default": 0}
    section: dict[str, Any] = {"name": rule, "branches": branches}
    if rule == "router":
        section |= {"layers": ROUTED, "inputs": gateskip.inputs, "parameters": {"router": {}}}
    elif rule == "layers":
        no_mlp_in_every_third = [[1, layer % 3 > 0] for layer in range(LAYERS)]
        mask = {"name": "layer_mask", "least": 0, "most": 1, "default": no_mlp_in_every_third}
        section |= {"exits": [2, 4], "warm_up": 2, "inputs": [mask, full_until], "parameters": {"layers": "0-5"}}
    elif rule == "loops":
        read = {"name": "loops", "least": 1, "most": LOOPS.most, "default": LOOPS.default}
        section |= {"layers": LOOPS.optional, "inputs": [read]}
    else:
        confidence = {"measure": "softmax", "threshold": 0.7, "decay": 4.0, "decay_tokens": 64, "guarantee": None}
        threshold = {"name": "exit_threshold", "least": 0, "most": 1}
        section |= {"exits": [2, 4], "warm_up": 0, "inputs": [threshold, full_until], "confidence": confidence}
    found: Policy = TypeAdapter(Policy).validate_python(section)
    return found


def toy_selection(mode: Mode) -> Selection:
    """A selection; by thresholds, with made-up ones for each budget."""
    if mode == "rank":
        return Selection(mode="rank", budget=0.8)
    grid = tuple(
        GridPoint(
            budget=budget,
            thresholds=tuple((threshold(cut, layer, 0), threshold(cut, layer, 1)) for layer in range(LAYERS)),
            kept_share=budget,
            kept=((budget, budget),) * LAYERS,
        )
        for budget, cut in GRID.items()
    )
    return Selection(mode="threshold", budget=0.8, grid=grid)


def threshold(cut: int | None, layer: int, column: int) -> float:
    """A threshold near `cut`, which differs from branch to branch."""
    return float("-inf") if cut is None else (cut + mix(layer, column) % 20) / 256


def rule_inputs(policy: Policy | None, by_sequence: bool) -> Shapes:
    """The rule's run-time inputs. Args: by_sequence: whether thresholds have a value for each sequence."""
    first: list[int | str] = ["batch"] if by_sequence else []
    shapes: Shapes = {
        "thresholds": [*first, LAYERS, 2],
        "budget": [],
        "layer_mask": ["batch", LAYERS, 2],
        "full_until": ["batch"],
        "exit_threshold": first,
        "loops": ["batch"],
    }
    return {one.name: shapes[one.name] for one in (policy.inputs if policy else ())}


def engine_inputs(reads: Shapes, *, counted: bool) -> Shapes:
    """The inputs of every engine except K and V: tokens, and the rule's run-time inputs."""
    read: Shapes = {"k": [1]} if counted else reads
    return {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "window"],
        "position_ids": ["batch", "sequence"],
        "write_at": ["batch"],
        "logits_at": ["batch", "logits_columns"],
        **read,
    }


def engine_graph(name: str, layers: Sequence[int], capacity: int, inputs: Shapes, outputs: Shapes) -> EngineGraph:
    """The entry of one engine. Args: inputs, outputs: without logits, K and V."""
    kv = [f"{layer}.{kv}" for layer in layers for kv in ("key", "value")]
    cache: list[int | str] = ["batch", 1, capacity, 1]
    return EngineGraph(
        file=f"{name}.engine",
        sha256=HASH,
        size_bytes=0,
        graph_sha256=HASH,
        weights_sha256=HASH,
        forms={},
        layers={},
        build_seconds=0.0,
        peak_bytes=0,
        inputs=tensors({**inputs, **{f"past_key_values.{one}": cache for one in kv}}),
        outputs=tensors(
            {
                "logits": ["batch", "logits_columns", VOCABULARY],
                **outputs,
                **{f"present.{one}": cache for one in kv},
            }
        ),
    )


def tensors(shapes: Shapes) -> tuple[TensorInfo, ...]:
    """Inputs or outputs, as a manifest lists them."""
    return tuple(TensorInfo(name=name, type="float", shape=tuple(shape)) for name, shape in shapes.items())
