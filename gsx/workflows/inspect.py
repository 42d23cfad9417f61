"""`gsx inspect`: what a model directory or a bundle is, without running it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gsx.workflows.text_facts import TextFacts, facts_of_bundle, facts_of_checkpoint
from gsx_engines.building.plan import PlanCounts, by_layer, count, read_plan
from gsx_engines.bundle.bundle import MANIFEST, open_bundle
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import RouterPolicy
from gsx_engines.errors import BundleError, EngineError
from gsx_engines.tensorrt.loading import ENGINES
from gsx_plugins.errors import UsageError

if TYPE_CHECKING:
    from gsx_exporter.checkpoint.adapter import Adapter
    from gsx_exporter.checkpoint.checkpoint import Checkpoint
    from gsx_exporter.config import ModelConfig

_Value = TypeVar("_Value", bool, str)
_PARITY = "parity.json"
# Gates and routers among a graph's weights, e.g. layers.3.mlp_gate.linear.weight.
_GATES = re.compile(r"\.(?:(?:attn|mlp)_gate|(?:attn_|mlp_)?(?:router|router_predictor|adapter))\.")


@dataclass(frozen=True)
class EnginePlan:
    """What the calls of one profile of an engine do.

    Args:
        engines: name of the set of engines.
        graph, profile: of the engine.
        total: the counts of a whole call (`gsx_engines.building.plan.PlanCounts`).
        layers: the same for each decoder layer, by its number; `-` for what comes before the first one.
        capturable: whether a CUDA graph can hold a call.
    """

    engines: str
    graph: str
    profile: str
    total: PlanCounts
    layers: Mapping[str, PlanCounts]
    capturable: bool


@dataclass(frozen=True)
class InspectReport:
    """What is known about a model or a bundle.

    Args:
        kind: a gated or dense checkpoint, or a bundle.
        path: as it was given.
        family: the model family.
        shape: sizes in elements: layers, hidden, heads, kv_heads, head_dim, vocabulary, positions.
        loops: of a looped model: layers `before`, `looped` and `after`, the loops `most` and `default`, `caches` (whose
            K and V stay, `Loops.caches`), the `visits` of layers with most loops, and `kv_values`, the numbers that the
            caches hold for a token; None of others.
        gates: kind, input and branches; None without.
        router: the entry of the checkpoint; None without.
        exits: depths that the checkpoint was trained to exit at.
        adapter: `base`, `kind`, `rank` and `alpha` of the LoRA adapter that is merged into the model; None without one.
        parameters: `dense` (a tied head counts once) and `gates`, which includes routers.
        types: how the weights are stored, or a bundle's precision.
        text: where a text ends, special and added tokens, chat template and context, and which files say so.
        notes: what is unusual about the model's files and how they were understood.
        bundle: source, selection, K/V policy, grid, graphs, parity of a bundle; None for a checkpoint.
        plans: what calls of its engines do (`EnginePlan`); None unless asked for.
        files: file name -> bytes.
    """

    kind: Literal["checkpoint", "bundle"]
    path: str
    family: str
    shape: Mapping[str, int]
    loops: Mapping[str, int | str] | None
    gates: Mapping[str, Any] | None
    router: Mapping[str, Any] | None
    exits: tuple[int, ...]
    adapter: Mapping[str, Any] | None
    parameters: Mapping[str, int]
    types: tuple[str, ...]
    text: TextFacts
    notes: tuple[str, ...]
    bundle: Mapping[str, Any] | None
    files: Mapping[str, int]
    plans: tuple[EnginePlan, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def inspect(path: str | Path, *, plan: bool = False) -> InspectReport:
    """Describe a model directory, a hub id or a bundle, without running it.

    Args:
        path: the directory or the hub id.
        plan: also count what the calls of a bundle's engines do.
    Returns: shape, gates, exits, number of parameters, how text is read and where it ends, files, and for a bundle the
        options that it was exported with.
    Raises:
        GsxError: it is neither a model nor a bundle, or it is damaged; or plans are asked for and there are none.
    Example:
        >>> gsx.inspect("my-model").gates["kind"]
        'vector'
        >>> gsx.inspect("out/demo").bundle["budget"]
        0.7
    """
    directory = Path(path)
    if (directory / MANIFEST).is_file():
        report = _bundle(directory, str(path))
        return replace(report, plans=_plans(directory)) if plan else report
    if plan:
        raise UsageError(
            "--plan: only engines have plans, and this is not a bundle",
            expected="a bundle in which gsx build has put engines",
            found=str(path),
            todo="gsx export, then gsx build",
        )
    return _checkpoint(str(path))


def _plans(directory: Path) -> tuple[EnginePlan, ...]:
    """The plans of all engines of a bundle. Raises: EngineError if there are no engines or one has no plan."""
    found = []
    for name, entry in open_bundle(directory).manifest.engines.items():
        rebuild = f"gsx build {directory} --backend {entry.backend}"
        for graph, engine in entry.graphs.items():
            steps = read_plan(directory / ENGINES / name / engine.file, rebuild)
            for number, profile in enumerate(entry.profiles):
                own = [step for step in steps if step.profile == number]
                total = count(own)
                found.append(EnginePlan(name, graph, profile.name, total, by_layer(own), total.capturable))
    if not found:
        raise EngineError(f"bundle {directory}: has no engines", todo=f"gsx build {directory}")
    return tuple(found)


def _checkpoint(path: str) -> InspectReport:
    from gsx_exporter.checkpoint.opening import open_checkpoint
    from gsx_exporter.checkpoint.tensors import rule_module_kind

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    counts = {"dense": 0, "gates": 0}
    for name in checkpoint.names:
        counts["gates" if rule_module_kind(name) else "dense"] += math.prod(checkpoint.shape(name))
    return InspectReport(
        kind="checkpoint",
        path=path,
        family=config.family,
        shape={
            "layers": config.stored_layers,
            "hidden": config.hidden_size,
            "mlp": config.intermediate_size,
            **_experts(config),
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocabulary": config.vocab_size,
            "positions": config.max_positions,
        },
        loops=_loops(config.loops, config.num_kv_heads * config.head_dim),
        gates=config.gate.to_dict() if config.gate else None,
        router=config.router.to_dict() if config.router else None,
        exits=config.exits,
        adapter=_adapter(checkpoint.adapter) if checkpoint.adapter else None,
        parameters=counts,
        types=_types(checkpoint),
        text=facts_of_checkpoint(checkpoint),
        notes=tuple(checkpoint.notes),
        bundle=None,
        files=_files(checkpoint.adapter.directory if checkpoint.adapter else checkpoint.directory)
        if checkpoint.gguf is None
        else {checkpoint.gguf.path.name: checkpoint.gguf.path.stat().st_size},
    )


def _loops(loops: Loops | None, width: int) -> dict[str, int | str] | None:
    """The loops of a model. Args: width: of K, and of V, in one cache."""
    if loops is None:
        return None
    visits = len(loops.visits)
    held = loops.layers if loops.share_caches else visits
    return {**loops.model_dump(), "visits": visits, "kv_values": 2 * held * width}


def _adapter(adapter: Adapter) -> dict[str, Any]:
    settings = adapter.settings
    return {
        "base": adapter.base,
        "kind": "DoRA" if settings.resized else "LoRA",
        "rank": settings.rank,
        "alpha": settings.alpha,
    }


def _types(checkpoint: Checkpoint) -> tuple[str, ...]:
    """How the weights are stored."""
    if checkpoint.gguf is not None:
        return tuple(kind.lower() for kind in checkpoint.gguf.tensors.kinds)
    return tuple(sorted({kind for file in checkpoint.stored.files for kind in _stored_types(file)}))


def _experts(config: ModelConfig) -> dict[str, int]:
    """The sizes of routed experts; nothing in a model without."""
    experts = config.experts
    if experts is None:
        return {}
    shared = {} if experts.shared_width is None else {"shared_expert": experts.shared_width}
    sizes = {"experts": experts.count, "experts_per_token": experts.per_token, "expert": experts.width}
    return {**sizes, **shared, "layers_with_experts": len(experts.layers)}


def _stored_types(file: Path) -> set[str]:
    """Types of the tensors in a safetensors file, from its header (8 bytes of length, then JSON)."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {entry["dtype"].lower() for name, entry in header.items() if name != "__metadata__"}


def _bundle(directory: Path, path: str) -> InspectReport:
    bundle = open_bundle(directory)
    manifest = bundle.manifest
    decoder = manifest.decoder
    return InspectReport(
        kind="bundle",
        path=path,
        family=decoder.family,
        shape={
            "layers": decoder.stored_layers,
            "hidden": decoder.hidden_size,
            "heads": decoder.num_heads,
            "kv_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
            "vocabulary": decoder.vocab_size,
            "positions": decoder.max_positions,
        },
        loops=_loops(decoder.loops, decoder.num_kv_heads * decoder.head_dim),
        gates=manifest.gates.model_dump(mode="json") if manifest.gates else None,
        router=_router(manifest),
        exits=_exits(directory),
        adapter=None,
        parameters=_parameters(directory, manifest),
        types=(manifest.precision,),
        text=facts_of_bundle(bundle),
        notes=manifest.source.notes,
        bundle=_bundle_facts(directory, manifest),
        files=_files(directory),
    )


def _bundle_facts(directory: Path, manifest: Manifest) -> dict[str, Any]:
    selection = manifest.selection
    return {
        "gsx_version": manifest.gsx_version,
        "source": manifest.source.model,
        "policy": manifest.policy.model_dump(mode="json") if manifest.policy else None,
        "select": selection.mode if selection else None,
        "budget": selection.budget if selection else None,
        "kv_policy": manifest.kv_policy,
        "draft": str(manifest.draft.draft) if manifest.draft else None,
        "draft_vocabulary": manifest.draft.vocabulary.model_dump()
        if manifest.draft and manifest.draft.vocabulary
        else None,
        "quantization": manifest.quantization.scheme if manifest.quantization else None,
        "kv_cache": manifest.kv_cache.type if manifest.kv_cache else None,
        "engines": {name: _engine_facts(entry) for name, entry in manifest.engines.items()},
        "grid": [{"budget": p.budget, "kept_share": p.kept_share} for p in selection.grid] if selection else [],
        "calibration": selection.calibration.model_dump() if selection and selection.calibration else None,
        "graphs": {name: list(entry.ops) for name, entry in manifest.graphs.items()},
        "parity": _parity(directory, "passed", bool),
        "verdict": _parity(directory, "verdict", str),
    }


def _engine_facts(entry: EngineEntry) -> dict[str, Any]:
    """For each graph's engine: products by the type they are computed in, and quantized ones in a wider type."""
    graphs = entry.graphs.items()
    return {name: {"products": dict(made.products), "widened": list(made.widened)} for name, made in graphs}


def _parity(directory: Path, key: str, kind: type[_Value]) -> _Value | None:
    """What the last `gsx verify` found; None if the bundle was not verified. (Older reports have no verdict.)"""
    try:
        value = json.loads((directory / _PARITY).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, kind) else None


def _exits(directory: Path) -> tuple[int, ...]:
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        depths = raw.get("gsx", {}).get("exits", raw.get("exit_layer_indices") or ())
        return tuple(sorted({int(depth) for depth in depths}))
    except (OSError, ValueError, AttributeError, TypeError):
        return ()


def _parameters(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Weights of the main graph, counted from its initializers."""
    import onnx

    entry = manifest.graphs["model"]
    try:
        graph = onnx.load(str(directory / entry.file), load_external_data=False).graph
    except Exception as error:  # protobuf raises errors of its own; the hash was right, so the file is ours
        raise BundleError(f"{directory / entry.file}: is not an ONNX file", found=str(error)) from error
    counts = {"dense": 0, "gates": 0}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            counts["gates" if _GATES.search(tensor.name) else "dense"] += math.prod(tensor.dims)
    return counts


def _files(directory: Path) -> dict[str, int]:
    return {p.relative_to(directory).as_posix(): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}


def _router(manifest: Manifest) -> Mapping[str, Any] | None:
    return manifest.policy.parameters.router if isinstance(manifest.policy, RouterPolicy) else None
