"""Vectors of `generation.json`: whole generations of the toy models, with the hash of every call to the runtime."""

from __future__ import annotations

from typing import Any

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import Sampling
from gsx_engines.speculation.draft import Draft, draft_on
from gsx_engines.speculation.spec import check_draft, parse_draft
from gsx_plugins.errors import GsxError
from tests.vectors.models import CONTEXT, END, EXIT, MODELS, VOCABULARY, toy_manifest
from tests.vectors.toy import ToyEngine, new_digest

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 24},
    "sampled": {"max_new_tokens": 24, "sampling": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "seed": 7}},
    "few": {"max_new_tokens": 24, "stop_ids": [], "sampling": {"temperature": 2.0, "top_k": 4, "seed": 3}},
    "likely": {"max_new_tokens": 24, "stop_ids": [], "sampling": {"temperature": 0.5, "min_p": 0.4, "seed": 9}},
    "hot": {"max_new_tokens": 24, "stop_ids": [], "sampling": {"temperature": 1.5, "seed": 2**64 - 1}},
    "other budget": {"max_new_tokens": 20, "keep": {"budget": 0.65}, "stop_ids": []},
    "budgets for each": {"max_new_tokens": 20, "keep": [{"budget": 0.4}, {}, {"budget": 1.0}]},
    "held": {"max_new_tokens": 36, "keep": {"budget": 0.6, "hold": True}, "stop_ids": []},
    "held, each its own": {
        "max_new_tokens": 36,
        "keep": [{"budget": 0.5, "hold": True}, {"budget": 0.9}, {"hold": True}],
        "stop_ids": [],
        "sampling": {"temperature": 0.8, "seed": 5},
    },
    "penalties": {
        "max_new_tokens": 24,
        "logprobs": 2,
        "sampling": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25},
    },
    "sampled, all else": {
        "max_new_tokens": 24,
        "logprobs": 0,
        "stop_ids": [],
        "sampling": {
            "temperature": 1.2,
            "min_p": 0.02,
            "seed": 11,
            "repetition_penalty": 1.2,
            "frequency_penalty": -0.5,
            "presence_penalty": 1.5,
            "logit_bias": {5: 2.0, 60: -100.0},
        },
    },
    "one token": {"max_new_tokens": 1},
    "stop ids": {"max_new_tokens": 40, "stop_ids": list(range(0, VOCABULARY, 9))},
    "a set of layers": {"max_new_tokens": 16, "keep": {"layers": "0-2,4.mlp"}},
    "an exit": {"max_new_tokens": 16, "keep": {"exit": 4}},
    "a speed-up": {"max_new_tokens": 16, "keep": {"speedup": 1.5}},
    "a set for each": {"max_new_tokens": 16, "keep": [{"layers": "0-2,4.mlp"}, {}, {"speedup": 1.5}]},
    "an exit threshold": {"max_new_tokens": 16, "keep": {"exit_threshold": "0.4"}},
    "a threshold for each": {
        "max_new_tokens": 16,
        "keep": [{"exit_threshold": "0.4"}, {}, {"exit_threshold": "inf"}],
    },
    "nothing leaves": {"max_new_tokens": 16, "keep": {"exit_threshold": "inf"}},
    "one loop": {"max_new_tokens": 16, "keep": {"loops": 1}},
    "loops for each": {"max_new_tokens": 16, "keep": [{"loops": 1}, {}, {"loops": 2}]},
    "to the context's end": {"max_new_tokens": 1000, "stop_ids": [], "long": True},
}
# Of steps: what the likeliest tokens alone may decide.
_STEPS = ("few", "likely")
# Models that generate, and their keep settings; the others refuse.
_FEW = ("greedy", "hot", "stop ids")
_SETS = ("greedy", "a set of layers", "an exit", "a speed-up", "a set for each")
_CONFIDENT = ("greedy", "an exit threshold", "a threshold for each", "nothing leaves")
_LOOPS = ("greedy", "one loop", "loops for each")
GENERATING = {
    "gated": tuple(name for name in OPTIONS if name not in {*_SETS[1:], *_CONFIDENT[1:], *_LOOPS[1:], *_STEPS}),
    "copy": _FEW,
    "one branch": _FEW,
    "dense": _FEW,
    "rank, counted by the host": _FEW,
    "rank": _FEW,
    "layers": _SETS,
    "layers, copy": _SETS,
    "calm": _CONFIDENT,
    "loops": _LOOPS,
    "some layers": ("greedy", "sampled", "other budget", "budgets for each", "held"),
    "gated, one table": ("greedy", "other budget"),
    "steps": (
        "greedy",
        "sampled",
        "few",
        "likely",
        "penalties",
        "hot",
        "budgets for each",
        "held",
        "to the context's end",
    ),
    "steps, sets of layers": ("greedy", "a set of layers", "a set for each"),
    "calm, one threshold": ("greedy", "an exit threshold"),
    "three ends": ("greedy", "sampled", "hot"),
}
PROMPTS = {
    "one": [[5, 60, 61, 7, 8, 9]],
    "ragged": [[11], [5, 60, END, 61, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23], [40, 41, 42]],
}


# Invalid requests: model, draft, prompts, options.
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
    ("gated", None, [[5]], {"sampling": {"temperature": 1.0, "min_p": 1.5}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 0.0, "repetition_penalty": 0.0}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 0.0, "frequency_penalty": 2.5}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 0.0, "presence_penalty": -2.25}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 0.0, "logit_bias": {5: 101.0}}}),
    ("gated", None, [[5]], {"sampling": {"temperature": 0.0, "logit_bias": {VOCABULARY: 1.0}}}),
    ("gated", None, [[5]], {"logprobs": 21}),
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
    *(("loops", None, [[5]], {"keep": {"loops": one}}) for one in (0, 3)),
    *((model, None, [[5]], {"keep": {"loops": 1}}) for model in ("gated", "dense", "layers")),
    *(("loops", draft, [[5]], {}) for draft in ("loops:2", "loops:0", "layers:3.mlp", "budget:0.5", "exit:3")),
    ("layers", "loops:1", [[5]], {}),
    ("calm, one threshold", None, [[5], [6]], {"keep": [{"exit_threshold": "0.5"}, {}]}),
    ("gated, one table", None, [[5], [6], [7]], {"keep": [{"budget": 0.5}, {}, {"budget": 0.5}]}),
    ("rank", None, [[5], [6]], {"keep": [{"budget": 0.5}, {}]}),
    *((model, None, [[5]], {"keep": {"hold": True}}) for model in ("dense", "layers", "rank", "gated, one table")),
    ("gated", None, [[5]], {"keep": {"exit": 2, "hold": True}}),
    ("old engines", None, [[5]], {"keep": {"budget": 0.5, "hold": True}}),
    ("gated", None, [[5], [6], [7]], {"keep": [{"budget": 0.5}, {}]}),
    ("layers", None, [[5], [6]], {"keep": [{"exit": 2}, {"exit": 3}]}),
    ("layers", None, [[5]], {"keep": {"exit": 2, "exit_threshold": "0.5"}}),
    ("gated", None, [[5]] * 5, {}),  # more sequences than a profile takes
    ("short", None, [[5]], {"max_new_tokens": 60}),  # than the engine's buffers hold
    ("rank in pieces", None, [list(range(3, 40))], {}),
]


def opened(manifest: Manifest, spec: str | None, digest: Any) -> tuple[Runner, Draft | None]:
    """The toy's runner, and its draft."""

    def stage(graph: str) -> TensorRTStage:
        engine = ToyEngine(manifest, graph, digest)
        steps = [(entry, engine) for entry in manifest.engines.values() if entry.kv_layout == "step"]
        return TensorRTStage(manifest, manifest.engines["toy"], graph, engine, steps)

    if spec is None:
        return WholeRunner(stage("model")), None
    kind = parse_draft(spec)
    check_draft(kind, manifest)
    split = kind.kind == "exit"
    draft = draft_on(SplitRunner(stage("draft"), stage("verify")) if split else WholeRunner(stage("model")), kind)
    return draft.runner, draft


def vectors() -> dict[str, Any]:
    """Generations of the toy models: plain, and with every kind of draft."""
    manifests = {name: toy_manifest(**options) for name, options in MODELS.items()}
    cases = []
    for model, names in GENERATING.items():
        manifest = manifests[model]
        drafts: list[tuple[str | None, int | None]] = [(None, None)]
        if manifest.draft is not None:
            drafts += [(f"exit:{EXIT}", 3), (f"exit:{EXIT}", 0)]
        skips = manifest.policy is not None and manifest.policy.name in ("gateskip", "layers")
        if manifest.draft is not None and skips:
            drafts += [("layers:1.mlp,4-5.mlp", 2)]
        if manifest.draft is not None and manifest.selection is not None:
            drafts += [("budget:0.4", 4)]
        if manifest.decoder.loops is not None:
            drafts += [("loops:1", 3)]
        for spec, length in drafts:
            for name, options in OPTIONS.items():
                for kind, prompts in PROMPTS.items():
                    needs = "one" if "long" in options else "ragged" if isinstance(options.get("keep"), list) else kind
                    if name not in names or kind != needs:
                        continue
                    cases.append(_case(model, manifest, spec, length, name, options, prompts))
    refused = [_refused(manifests, *asked) for asked in REFUSED]
    return {
        "manifests": {name: one.model_dump(mode="json") for name, one in manifests.items()},
        "cases": cases + refused,
    }


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
            "held_kept_rows": stats.held_kept_rows,
            "held_gated_rows": stats.held_gated_rows,
        },
        "calls_sha256": digest.hexdigest(),
    }


def _refused(
    manifests: dict[str, Manifest], model: str, spec: str | None, prompts: list[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    asked = _asked(options)
    try:
        _generate(manifests[model], spec, prompts, asked, new_digest())
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
        **({"logprobs": options["logprobs"]} if "logprobs" in options else {}),
    }


def _generate(
    manifest: Manifest, spec: str | None, prompts: list[list[int]], asked: dict[str, Any], digest: Any
) -> Generation:
    sampling, raw = Sampling(**asked["sampling"]), asked["keep"]
    keep = [_keep(one) for one in raw] if isinstance(raw, list) else _keep(raw)
    runner, draft = opened(manifest, spec, digest)
    return generate(runner, prompts, draft=draft, **{**asked, "sampling": sampling, "keep": keep})


def _keep(raw: dict[str, Any]) -> KeepSettings:
    """Keep settings as in the vectors: an exit threshold is text, since JSON has no infinity."""
    return KeepSettings(**{name: float(value) if name == "exit_threshold" else value for name, value in raw.items()})
