"""Writes the vectors: `python -m tests.vectors.make`. A test makes them anew and compares, so they cannot grow old.

Each file holds inputs and what Python makes of them: `sampling.json` picks of tokens, `draft_length.json` the rule for
how far to draft, `thresholds.json` thresholds by budget, `generation.json` whole generations of the toy model, with the
hash of every call that a runtime would have got.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gsx_engines.bundle.controls import Keep
from gsx_engines.bundle.engine_entry import EngineEntry, EngineProfile, Sizes
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import gateskip_policy
from gsx_engines.bundle.selection import Selection
from gsx_engines.generation import Generation, generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import Picker, Sampling, candidates
from gsx_engines.speculation.draft import Draft, draft_on
from gsx_engines.speculation.length import AdaptiveLength, Round
from gsx_engines.speculation.spec import check_draft, parse_draft
from gsx_plugins.errors import GsxError
from tests.vectors.toy import ToyEngine, mix, new_digest

FOLDER = Path(__file__).parent
LAYERS, EXIT, VOCABULARY, CONTEXT, END = 6, 3, 97, 100, 2
# What a rule that does not reach every layer may skip.
ROUTED = (1, 3, 4)
HASH = "0" * 64


def float_text(value: float) -> str:
    """A float64's bits, so that no reader rounds it."""
    return struct.pack(">d", value).hex()


# -- sampling ----------------------------------------------------------------------------------------------------

SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 0.9, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.95},
    {"temperature": 1e-6},
    {"temperature": 1e-300, "top_p": 0.9},
    {"temperature": 2.5, "top_k": 10_000, "top_p": 0.999},
]
# name -> (number of logits, the logit of a hash's 24 bits)
KINDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "one": (1, lambda bits: bits * 2.0**-20),
    "ties": (64, lambda bits: float(bits % 4)),
    "all equal": (300, lambda bits: -3.5),
    "wide": (1000, lambda bits: (bits - 2**23) * 2.0**-17),
    "close": (1000, lambda bits: (bits - 2**23) * 2.0**-23),
    "one ruled out": (20, lambda bits: -math.inf if bits % 3 == 0 else float(bits % 4)),
}
# By these no token can be chosen.
REFUSED_KINDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "some are no numbers": (20, lambda bits: math.nan if bits % 3 == 0 else float(bits % 4)),
    "some are infinite": (20, lambda bits: math.inf if bits % 3 == 0 else float(bits % 4)),
    "all ruled out": (20, lambda bits: -math.inf),
}


def kind_logits(kind: str, seed: int) -> np.ndarray:
    """Logits [V] float32 of a kind: exact in every language."""
    size, logit = (KINDS | REFUSED_KINDS)[kind]
    return np.array([logit(mix(seed, v) >> 8) for v in range(size)], np.float32)


def sampling_vectors() -> list[dict[str, Any]]:
    """Picks at several places for every kind of logits and way of sampling."""
    cases = []
    for kind in KINDS:
        for number, options in enumerate(SAMPLINGS):
            sampling = Sampling(**options, seed=(number * 0x9E3779B97F4A7C15) % 2**64)  # type: ignore[arg-type]
            logits = kind_logits(kind, number)
            places = [(sequence, place) for sequence in (0, 3) for place in (0, 1, 17, 4095)]
            cases.append(
                {
                    "kind": kind,
                    "logits_seed": number,
                    "sampling": {**options, "seed": sampling.seed},
                    "candidates": None if sampling.greedy else len(candidates(logits, sampling)[0]),
                    "picks": [[*at, Picker(sampling).pick(logits, *at)] for at in places],
                }
            )
    for kind in REFUSED_KINDS:
        for options in SAMPLINGS[:3]:
            sampling = Sampling(**options, seed=1)  # type: ignore[arg-type]
            try:
                Picker(sampling).pick(kind_logits(kind, 0), 0, 0)
            except GsxError as error:
                asked = {**options, "seed": sampling.seed}
                cases.append({"kind": kind, "logits_seed": 0, "sampling": asked, "error": str(error)})
            else:
                raise AssertionError(f"{kind}, {options}: nobody refused")
    return cases


# -- draft length ------------------------------------------------------------------------------------------------


def draft_length_vectors() -> list[dict[str, Any]]:
    """Rounds with made-up times: what the rule says before each, and after it about another token."""
    cases = []
    for seed, (first, cost) in enumerate([(4, 0.3), (2, 0.05), (4, 0.9), (7, 0.15)]):
        rule = AdaptiveLength(first)
        rounds = []
        for number in range(80):
            wanted = rule.next()
            chance = (mix(seed, number) % 100) / 100
            goes_on = [rule.goes_on(drafted, chance**drafted) for drafted in (1, 2, 5)]
            length = min(wanted, 1 + mix(seed, number, 1) % 6) if wanted else 0
            right = mix(seed, number, 2) % (length + 1)
            one = Round(
                length,
                1.0 + right,
                right,
                int(right < length),
                length * 0.625,
                cost * length * (1 + (mix(seed, number, 3) % 16) / 64),
                1 + length * 0.0625 * (mix(seed, number, 4) % 3),
            )
            rule.learn(one)
            # Of a round: what was asked, what was answered, what was learned.
            rounds.append(
                {
                    "next": wanted,
                    "chance": float_text(chance),
                    "goes_on": goes_on,
                    "length": one.length,
                    "accepted": one.accepted,
                    "rejected": one.rejected,
                    "seconds": [float_text(one.draft_seconds), float_text(one.verify_seconds)],
                    "acceptance": float_text(rule.acceptance),
                }
            )
        cases.append({"first": first, "rounds": rounds})
    return cases


# -- the toy model -----------------------------------------------------------------------------------------------

GRID = ((1.0, None), (0.8, 51), (0.5, 127), (0.3, 180))
PROFILES = {
    "one": [("any", (1, 8, 64), (1, 1, 4))],
    "two": [("prefill", (2, 8, 16), (1, 1, 4)), ("decode", (1, 1, 1), (1, 1, 4))],
    "verify": [("prefill", (1, 8, 24), (1, 1, 4)), ("verify", (2, 4, 6), (1, 1, 4)), ("decode", (1, 1, 1), (1, 1, 4))],
}
# name -> what differs from a gated model of K/V policy `compute` that drafts with its exit
MODELS: dict[str, dict[str, Any]] = {
    "gated": {},
    "copy": {"kv_policy": "copy", "profiles": "two"},
    "one branch": {"branches": ["mlp"], "profiles": "verify"},
    "dense": {"branches": [], "profiles": "two"},
    "rank, counted by the host": {"mode": "rank", "draft": None, "count": "k"},
    "rank": {"mode": "rank", "draft": None},
    "layers": {"rule": "layers"},
    "layers, copy": {"rule": "layers", "kv_policy": "copy", "profiles": "two"},
    "calm": {"rule": "calm", "kv_policy": "copy"},
    "some layers": {"rule": "router", "profiles": "verify"},
    "rank in pieces": {"mode": "rank", "draft": None, "profiles": "two"},
    "short": {"capacity": 32},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 24},
    "sampled": {"max_new_tokens": 24, "sampling": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "seed": 7}},
    "hot": {"max_new_tokens": 24, "stop_ids": [], "sampling": {"temperature": 1.5, "seed": 2**64 - 1}},
    "other budget": {"max_new_tokens": 20, "keep": {"budget": 0.65}, "stop_ids": []},
    "one token": {"max_new_tokens": 1},
    "stop ids": {"max_new_tokens": 40, "stop_ids": list(range(0, VOCABULARY, 9))},
    "a set of layers": {"max_new_tokens": 16, "keep": {"layers": "0-2,4.mlp"}},
    "an exit": {"max_new_tokens": 16, "keep": {"exit": 4}},
    "a speed-up": {"max_new_tokens": 16, "keep": {"speedup": 1.5}},
    "a set for each": {"max_new_tokens": 16, "keep": [{"layers": "0-2,4.mlp"}, {}, {"speedup": 1.5}]},
    "an exit threshold": {"max_new_tokens": 16, "keep": {"exit_threshold": "0.4"}},
    "nothing leaves": {"max_new_tokens": 16, "keep": {"exit_threshold": "inf"}},
    "to the context's end": {"max_new_tokens": 1000, "stop_ids": [], "long": True},
}
# Models that generate, and what they are asked for; the others refuse.
_FEW = ("greedy", "hot", "stop ids")
_SETS = ("greedy", "a set of layers", "an exit", "a speed-up", "a set for each")
_CONFIDENT = ("greedy", "an exit threshold", "nothing leaves")
GENERATING = {
    "gated": tuple(name for name in OPTIONS if name not in {*_SETS[1:], *_CONFIDENT[1:]}),
    "copy": _FEW,
    "one branch": _FEW,
    "dense": _FEW,
    "rank, counted by the host": _FEW,
    "rank": _FEW,
    "layers": _SETS,
    "layers, copy": _SETS,
    "calm": _CONFIDENT,
    "some layers": ("greedy", "sampled", "other budget"),
}
PROMPTS = {
    "one": [[5, 60, 61, 7, 8, 9]],
    "ragged": [[11], [5, 60, END, 61, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23], [40, 41, 42]],
}


# What is asked wrongly: model, draft, prompts, options.
REFUSED: list[tuple[str, str | None, list[list[int]], dict[str, Any]]] = [
    ("gated", None, [], {}),
    ("gated", None, [[5], []], {}),
    ("gated", None, [list(range(CONTEXT))], {}),
    ("gated", None, [[5, VOCABULARY]], {}),
    ("gated", None, [[-1]], {}),
    ("gated", None, [[5]], {"max_new_tokens": 0}),
    ("gated", None, [[5]], {"keep": {"budget": 0.1}}),
    ("gated", None, [[5]], {"keep": {"budget": 1.5}}),
    ("gated", None, [[5]], {"keep": {"budget": -1.0}}),
    ("dense", None, [[5]], {"keep": {"budget": 0.5}}),
    ("gated", None, [[5]], {"sampling": {"temperature": -1.0}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 1.0, "top_k": -3}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 1.0, "top_p": 0.0}}),
    ("gated", "exit:3", [[5]], {"draft_length": -1}),
    ("gated", "exit:3", [[5]], {"draft_length": CONTEXT + 1}),
    ("gated", "exit:2", [[5]], {}),
    ("gated", "exit:9", [[5]], {}),
    ("dense", "budget:0.5", [[5]], {}),
    ("gated", "budget:0.1", [[5]], {}),
    ("gated", "layers:0-5", [[5]], {}),
    ("one branch", "layers:2.attn", [[5]], {}),
    ("rank", "budget:0.5", [[5]], {}),
    *(("gated", spec, [[5]], {}) for spec in ("exit", "exit:", "exit:x", "nothing:2", "layers:3-1", "layers:1.head")),
    ("gated", None, [[5]], {"keep": {"layers": "0-3"}}),
    ("dense", None, [[5]], {"keep": {"exit": 3}}),
    ("layers", None, [[5]], {"keep": {"budget": 0.5}}),
    ("layers", None, [[5]], {"keep": {"layers": "4-9"}}),
    ("layers", None, [[5]], {"keep": {"layers": "all"}}),
    ("layers, copy", None, [[5]], {"keep": {"layers": "0.mlp,3"}}),
    *(("layers", None, [[5]], {"keep": {"exit": depth}}) for depth in (0, 3, 7)),
    *(("layers", None, [[5]], {"keep": {"speedup": target}}) for target in (0.5, 4.0)),
    ("layers", "budget:0.5", [[5]], {}),
    ("calm", "layers:2.mlp", [[5]], {}),
    ("some layers", "layers:2.mlp", [[5]], {}),
    ("calm", None, [[5]], {"keep": {"budget": 0.5}}),
    ("calm", None, [[5]], {"keep": {"exit": 3}}),
    *(("calm", None, [[5]], {"keep": {"exit_threshold": one}}) for one in ("-0.1", "1.01", "-inf", "nan")),
    *((model, None, [[5]], {"keep": {"exit_threshold": "0.5"}}) for model in ("gated", "dense", "layers")),
    ("calm", None, [[5], [6]], {"keep": [{"exit_threshold": "0.5"}, {}]}),
    ("gated", None, [[5], [6], [7]], {"keep": [{"budget": 0.5}, {}, {"budget": 0.5}]}),
    ("gated", None, [[5], [6], [7]], {"keep": [{"budget": 0.5}, {}]}),
    ("layers", None, [[5], [6]], {"keep": [{"exit": 2}, {"exit": 3}]}),
    ("layers", None, [[5]], {"keep": {"exit": 2, "exit_threshold": "0.5"}}),
    ("gated", None, [[5]] * 5, {}),  # more sequences than a profile takes
    ("short", None, [[5]], {"max_new_tokens": 60}),  # than the engine's buffers hold
    ("rank in pieces", None, [list(range(3, 40))], {}),
]


def tensors(shapes: list[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Inputs or outputs, as a manifest lists them."""
    return [{"name": name, "type": "float", "shape": shape} for name, shape in shapes]


def toy_manifest(
    *,
    kv_policy: str = "compute",
    branches: list[str] | None = None,
    rule: str = "gateskip",
    mode: str = "threshold",
    draft: int | None = EXIT,
    count: str | None = None,
    profiles: str = "one",
    capacity: int = CONTEXT,
) -> dict[str, Any]:
    """The manifest of a toy model, with its engine entry `toy`, as plain JSON."""
    branches = ["attn", "mlp"] if branches is None else branches
    tables = [
        [[None if cut is None else (cut + mix(layer, m) % 20) / 256 for m in range(2)] for layer in range(LAYERS)]
        for _, cut in GRID
    ]
    grid = [
        {"budget": budget, "thresholds": table, "kept_share": budget, "kept": [[budget, budget]] * LAYERS}
        for (budget, _), table in zip(GRID, tables, strict=True)
    ]
    selection = {"mode": mode, "budget": 0.8} | ({"grid": grid} if mode == "threshold" else {})
    graphs = {"model": range(LAYERS)}
    if draft is not None:
        graphs |= {"draft": range(draft), "verify": range(draft, LAYERS)}
    gated = bool(branches) and rule == "gateskip"
    selects = gated or rule == "router"
    policy: dict[str, Any] | None = None
    controls: list[tuple[str, list[Any]]] = []
    if rule == "layers":
        policy = {
            "name": "layers",
            "branches": branches,
            "warm_up": 2,
            "exits": [2, 4],
            "inputs": [
                {
                    "name": "layer_mask",
                    "least": 0,
                    "most": 1,
                    "default": [[1, layer % 3 > 0] for layer in range(LAYERS)],
                },
                {"name": "full_until", "least": 0, "most": None, "default": 0},
            ],
        }
        controls = [("layer_mask", ["batch", LAYERS, 2]), ("full_until", ["batch"])]
    elif rule == "calm":
        policy = {
            "name": "calm",
            "branches": branches,
            "inputs": [
                {"name": "exit_threshold", "least": 0, "most": 1},
                {"name": "full_until", "least": 0, "most": None, "default": 0},
            ],
            "warm_up": 0,
            "exits": [2, 4],
            "confidence": {
                "measure": "softmax",
                "threshold": 0.7,
                "decay": 4.0,
                "decay_tokens": 64,
                "guarantee": None,
            },
        }
        controls = [("exit_threshold", []), ("full_until", ["batch"])]
    elif branches:
        policy = gateskip_policy(mode, branches).model_dump()  # type: ignore[arg-type]
        if rule == "router":
            policy |= {"name": "router", "layers": ROUTED}
        chooses = {"threshold": ("thresholds", [LAYERS, 2]), "rank": ("budget", [])}[mode]
        controls = [("k", [1]) if count else chooses]
    passes: list[tuple[str, list[Any]]] = [("exit_hidden", ["batch", "sequence", 1])]
    if kv_policy == "copy":
        passes += [(f"exit_{kv}", ["batch", 1, "sequence", 1]) for kv in ("key", "value")]
    engines = {}
    reached = ROUTED if rule == "router" else range(LAYERS)
    for name, layers in graphs.items():
        kv = [f"{layer}.{kv}" for layer in layers for kv in ("key", "value")]
        inputs: list[tuple[str, list[Any]]] = [
            ("input_ids", ["batch", "sequence"]),
            ("attention_mask", ["batch", "window"]),
            ("position_ids", ["batch", "sequence"]),
            ("write_at", ["batch"]),
            ("logits_at", ["batch", "logits_columns"]),
            *controls,
            *(passes if name == "verify" else []),
            *((f"past_key_values.{one}", ["batch", 1, capacity, 1]) for one in kv),
        ]
        outputs: list[tuple[str, list[Any]]] = [
            ("logits", ["batch", "logits_columns", VOCABULARY]),
            *(passes if name == "draft" else []),
            *([("kept", [sum(layer in reached for layer in layers) * len(branches)])] if branches else []),
            *((f"present.{one}", ["batch", 1, capacity, 1]) for one in kv),
        ]
        engines[name] = {
            "file": f"{name}.engine",
            "sha256": HASH,
            "size_bytes": 0,
            "graph_sha256": HASH,
            "weights_sha256": HASH,
            "forms": {},
            "layers": {},
            "build_seconds": 0.0,
            "peak_bytes": 0,
            "inputs": tensors(inputs),
            "outputs": tensors(outputs),
        }
    entry = EngineEntry.model_validate(
        {
            "schema_version": 1,
            "backend": "tensorrt-rtx",
            "tensorrt_version": "0",
            "targets": ["89"],
            "platform": "any",
            "gpu": None,
            "precision": "fp32",
            "capacity": capacity,
            "plugins": None,
            "profiles": [
                EngineProfile(
                    name=name, batch=Sizes(*batch), tokens=Sizes(*tokens), window=Sizes(1, min(64, capacity), capacity)
                )
                for name, tokens, batch in PROFILES[profiles]
            ],
            "graphs": engines,
        }
    )
    manifest = Manifest.model_validate(
        {
            "schema_version": 1,
            "gsx_version": "0",
            "tools": {},
            "kv_policy": kv_policy,
            "precision": "fp32",
            "source": {"model": "toy", "weights_sha256": HASH},
            "decoder": {
                "family": "toy",
                "vocab_size": VOCABULARY,
                "hidden_size": 1,
                "num_layers": LAYERS,
                "num_heads": 1,
                "num_kv_heads": 1,
                "head_dim": 1,
                "max_positions": CONTEXT,
                "windows": [None] * LAYERS,
                "bos_id": None,
                "eos_ids": [END],
                "pad_id": None,
            },
            "gates": {"kind": "scalar", "input": "post_norm", "branches": branches} if gated else None,
            "selection": selection if selects else None,
            "policy": policy,
            "graphs": {
                name: {
                    "file": f"{name}.onnx",
                    "sha256": HASH,
                    "inputs": tensors(passes if name == "verify" else []),
                    "outputs": tensors(passes if name == "draft" else []),
                    "ops": [],
                }
                for name in graphs
            },
            "weights": {"file": "weights.bin", "sha256": HASH, "size_bytes": 0},
            "draft": {"draft": {"kind": "exit", "layer": draft}, "length": 3} if draft is not None else None,
            "engines": {"toy": entry.model_dump()},
        }
    )
    return manifest.model_dump(mode="json")


def opened(manifest: Manifest, spec: str | None, digest: Any) -> tuple[Runner, Draft | None]:
    """The toy's runner, and what drafts on it."""

    def stage(graph: str) -> TensorRTStage:
        return TensorRTStage(manifest, manifest.engines["toy"], graph, ToyEngine(manifest, graph, digest))

    if spec is None:
        return WholeRunner(stage("model")), None
    kind = parse_draft(spec)
    check_draft(kind, manifest)
    split = kind.kind == "exit"
    draft = draft_on(SplitRunner(stage("draft"), stage("verify")) if split else WholeRunner(stage("model")), kind)
    return draft.runner, draft


def generation_vectors() -> dict[str, Any]:
    """Generations of the toy models: plain, and with every kind of draft."""
    manifests = {name: toy_manifest(**options) for name, options in MODELS.items()}
    cases = []
    for model, names in GENERATING.items():
        manifest = Manifest.model_validate(manifests[model])
        drafts: list[tuple[str | None, int | None]] = [(None, None)]
        if manifest.draft is not None:
            drafts += [(f"exit:{EXIT}", 3), (f"exit:{EXIT}", 0)]
        skips = manifest.policy is not None and manifest.policy.name in ("gateskip", "layers")
        if manifest.draft is not None and skips:
            drafts += [("layers:1.mlp,4-5.mlp", 2)]
        if manifest.draft is not None and manifest.selection is not None:
            drafts += [("budget:0.4", 4)]
        for spec, length in drafts:
            for name, options in OPTIONS.items():
                for kind, prompts in PROMPTS.items():
                    needs = "one" if "long" in options else "ragged" if isinstance(options.get("keep"), list) else kind
                    if name not in names or kind != needs:
                        continue
                    cases.append(_case(model, manifest, spec, length, name, options, prompts))
    return {"manifests": manifests, "cases": cases + [_refused(manifests, *asked) for asked in REFUSED]}


def _case(
    model: str,
    manifest: Manifest,
    spec: str | None,
    length: int | None,
    name: str,
    options: dict[str, Any],
    prompts: list[list[int]],
) -> dict[str, Any]:
    digest = new_digest()
    asked = _asked(options | {"draft_length": length})
    made = _generate(manifest, spec, prompts, asked, digest)
    stats = made.stats
    return {
        "name": f"{model}, {spec or 'plain'}, {name}",
        "model": model,
        "draft": spec,
        "prompts": prompts,
        "options": asked,
        "sequences": [{"tokens": one.tokens, "finish": one.finish} for one in made.sequences],
        "stats": {
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "sequences": stats.sequences,
            "decode_steps": stats.decode_steps,
            "drafted": list(stats.drafted),
            "accepted": list(stats.accepted),
            "kept_rows": stats.kept_rows,
            "gated_rows": stats.gated_rows,
        },
        "calls_sha256": digest.hexdigest(),
    }


def _refused(
    manifests: dict[str, Any], model: str, spec: str | None, prompts: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    manifest = Manifest.model_validate(manifests[model])
    asked = _asked(options)
    try:
        _generate(manifest, spec, prompts, asked, new_digest())
    except GsxError as error:
        return {"model": model, "draft": spec, "prompts": prompts, "options": asked, "error": str(error)}
    raise AssertionError(f"{model}, {spec}, {options}: nobody refused")


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """Options in full."""
    return {
        "max_new_tokens": options.get("max_new_tokens", 8),
        "keep": options.get("keep", {}),
        "sampling": options.get("sampling", {"temperature": 0.0}),
        "stop_ids": options.get("stop_ids"),
        "draft_length": options.get("draft_length"),
    }


def _generate(
    manifest: Manifest, spec: str | None, prompts: list[list[int]], asked: dict[str, Any], digest: Any
) -> Generation:
    sampling, raw = Sampling(**asked["sampling"]), asked["keep"]
    keep = [_keep(one) for one in raw] if isinstance(raw, list) else _keep(raw)
    runner, draft = opened(manifest, spec, digest)
    return generate(runner, prompts, draft=draft, **{**asked, "sampling": sampling, "keep": keep})


def _keep(raw: dict[str, Any]) -> Keep:
    """A choice as the vectors have it: an exit threshold is text, since JSON has no infinity."""
    return Keep(**{name: float(value) if name == "exit_threshold" else value for name, value in raw.items()})


def threshold_vectors() -> dict[str, Any]:
    """Thresholds of the gated toy by budget, as the float32's own bits."""
    raw = toy_manifest()
    selection = Manifest.model_validate(raw).selection
    assert isinstance(selection, Selection)
    budgets = [1.0, 0.99, 0.9, 0.8, 0.77, 2 / 3, 0.5, 0.31, 0.3]
    return {
        "manifest": raw,
        "budgets": [
            {"budget": float_text(budget), "bits": selection.thresholds_for(budget).view(np.uint32).ravel().tolist()}
            for budget in budgets
        ],
    }


FILES: dict[str, Callable[[], Any]] = {
    "sampling": sampling_vectors,
    "draft_length": draft_length_vectors,
    "thresholds": threshold_vectors,
    "generation": generation_vectors,
}


def text_of(name: str) -> str:
    """A file of vectors: JSON, one case a line."""
    made = FILES[name]()
    parts = made if isinstance(made, list) else made.get("cases")
    if parts is None:
        return json.dumps(made) + "\n"
    lines = "[\n" + ",\n".join(json.dumps(part) for part in parts) + "\n]"
    if isinstance(made, list):
        return lines + "\n"
    return '{"manifests": ' + json.dumps(made["manifests"]) + ',\n"cases": ' + lines + "}\n"


if __name__ == "__main__":
    for file in FILES:
        (FOLDER / f"{file}.json").write_text(text_of(file), encoding="utf-8")
