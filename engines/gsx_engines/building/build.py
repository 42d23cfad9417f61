"""`gsx build`: engines for all graphs of a bundle, written whole or not at all, and listed in its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import onnx

from gsx_engines.building.job import Job, Ranges, run_job
from gsx_engines.building.layer_information import EIGHT_BITS, UNKNOWN
from gsx_engines.building.memory import check_memory
from gsx_engines.building.placing import writing_engines
from gsx_engines.building.plan import step_from, write_plan
from gsx_engines.building.plugin_targets import with_kernels
from gsx_engines.building.profiles import default_profiles, one_profile, parse_profile
from gsx_engines.bundle.bundle import Bundle, open_bundle, sha256_of
from gsx_engines.bundle.engine_entry import EngineEntry, EngineGraph, EngineProfile, KvLayout, PluginLibrary, Sizes
from gsx_engines.bundle.tensors import tensor_info
from gsx_engines.defaults import BUILD_CONTEXT
from gsx_engines.errors import EngineError
from gsx_engines.lowering import tensorrt as lowering
from gsx_engines.lowering.for_tensorrt.gates import exact_in_tf32
from gsx_engines.lowering.for_tensorrt.shared_weights import write_joined
from gsx_engines.lowering.for_tensorrt.task import LOGITS_COLUMNS, RUN, WINDOW, K
from gsx_engines.lowering.for_tensorrt.zero_points import load_zero_points
from gsx_engines.lowering.passes import not_as_expected
from gsx_engines.lowering.products import quantized_products
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.backend import (
    Backend,
    default_targets,
    dotted,
    has_fp8,
    known_targets,
    load_module,
    platform_name,
)
from gsx_engines.tensorrt.profile_choice import most_rows
from gsx_plugins.errors import UsageError
from gsx_plugins.files import cache_folder
from gsx_plugins.graph import Graph, LayoutError
from gsx_plugins.library import MOST_STEP_ROWS, PLUGIN_OPS, STEP_OPS, find_library, library_hash, record_of
from gsx_plugins.progress import OnProgress, Progress, silent

# TensorScatter, RotaryEmbedding and RMSNormalization came with it (NVIDIA's changelog).
OLDEST_TENSORRT = (10, 15)
# Disk space for an engine beyond its weights (which it may hold once for every profile): mostly kernels.
_DISK_SLACK = 128 << 20


def build(
    bundle: str | Path | Bundle,
    *,
    backend: Backend = "tensorrt-rtx",
    targets: Sequence[str] = (),
    context: int | None = None,
    batch: int = 1,
    profiles: Sequence[str] = (),
    plugins: Literal["auto", "none"] | Path = "auto",
    kv_layout: KvLayout = "in-place",
    step: int | None = None,
    timing_cache: Path | None = None,
    on_progress: OnProgress = silent,
) -> tuple[str, EngineEntry]:
    """Build an engine for every graph of a bundle, and add them to the bundle.

    Args:
        bundle: an opened bundle or its directory.
        backend: `tensorrt-rtx` builds without a GPU; `tensorrt` builds on the GPU that the engine is for.
        targets: compute capabilities such as "89" or "8.9", only for TensorRT-RTX; empty for the GPU of this machine
            or, if there is none, for all from 8.0 on.
        context: columns of the K/V buffers, or the most that K and V may grow to; None for the model's context, at most
            4,096.
        batch: the most sequences in a call.
        profiles: in the form that `parse_profile` reads; empty for one for prefill and one for decoding, or with
            TensorRT-RTX a single one for both.
        plugins: `auto` uses the library that was built on this machine, if there is one; `none` uses no plugins.
        kv_layout: `in-place` for gsx; `growing` for programs that manage K and V themselves.
        step: build engines for steps of exactly `batch` sequences with so many tokens each, beside those for all calls.
        timing_cache: file for TensorRT's timings; None for one in the user's cache folder. Not used by TensorRT-RTX.
        on_progress: called with the progress; the note is TensorRT's phase.
    Returns: the name of the engines in the bundle, and their entry in its manifest.
    Raises:
        GsxError: an option, a bundle, a machine or a graph that cannot be used.
    Example:
        >>> name, engines = gsx.build("out/demo", backend="tensorrt-rtx", targets=["8.9"], context=256)
        >>> engines.targets
        ('89',)
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if opened.manifest.hides_skipped:
        raise UsageError(
            "engines have one attention mask for all layers, but this bundle needs one for each layer",
            expected="a bundle in which skipped tokens have K and V (K/V policy compute or copy)",
            found="K/V policy none with routers: a skipped token is invisible in its layer",
            todo="run it on ONNX Runtime or with --backend torch",
        )
    if opened.manifest.kv_cache is not None:
        raise UsageError(
            "TensorRT's K/V update only supports 16- and 32-bit floats",
            expected=f"a bundle exported without --kv-cache {opened.manifest.kv_cache.type}",
            todo="run it on ONNX Runtime, or export again",
        )
    module = check_backend(backend)
    chosen, gpu = _targets(module, backend, targets)
    if opened.manifest.quantization is not None and opened.manifest.quantization.is_float8:
        chosen = _with_fp8(opened, module, backend, targets, chosen)
    if step is None:
        capacity, shapes = _shapes(opened, backend, context, batch, profiles)
    else:
        kv_layout, capacity, shapes = _step(opened, backend, context, batch, profiles, kv_layout, step)
    library = _library(plugins)
    portable = {name: _load(opened, name) for name in opened.manifest.graphs}
    if any(node.op_type in PLUGIN_OPS for model in portable.values() for node in model.graph.node):
        chosen = with_kernels(library, targets, chosen)
    lowered = {
        name: _lower(opened, name, model, capacity, kv_layout, shapes, library) for name, model in portable.items()
    }
    sizes = {name: weight_bytes(graph) for name, graph in lowered.items()}
    check_memory(max(sizes.values()), len(shapes))
    disk = len(shapes) * sum(sizes.values()) + max(map(joined_bytes, lowered.values())) + _DISK_SLACK * len(sizes)
    version = module.__version__
    suffix = {"in-place": "", "growing": "-growing", "step": f"-step-{batch}x{step}-{capacity}"}[kv_layout]
    name = f"{backend}-{version}-sm{'-'.join(chosen)}{suffix}"
    with writing_engines(opened, name, disk) as (work, finish):
        graphs, used = {}, False
        for graph, model in portable.items():
            on_progress(Progress(f"building {graph}"))
            entry, with_plugins = _build_graph(
                opened,
                graph,
                model,
                lowered[graph],
                work,
                backend=backend,
                targets=() if backend == "tensorrt" else chosen,
                profiles=shapes,
                library=library,
                timing_cache=timing_cache or _timing_cache(version, gpu) if backend == "tensorrt" else None,
                on_progress=on_progress,
            )
            graphs[graph] = entry
            used = used or with_plugins
        made = EngineEntry(
            schema_version=1,
            backend=backend,
            tensorrt_version=version,
            targets=chosen,
            platform=platform_name(),
            gpu=gpu if backend == "tensorrt" else None,
            precision=opened.manifest.precision,
            kv_layout=kv_layout,
            capacity=capacity,
            profiles=shapes,
            plugins=_plugin_entry(library) if library is not None and used else None,
            graphs=graphs,
        )
        finish(made)
    return name, made


def _build_graph(
    bundle: Bundle,
    name: str,
    portable: onnx.ModelProto,
    lowered: lowering.Lowered,
    work: Path,
    *,
    backend: Backend,
    targets: tuple[str, ...],
    profiles: Sequence[EngineProfile],
    library: Path | None,
    timing_cache: Path | None,
    on_progress: OnProgress,
) -> tuple[EngineGraph, bool]:
    """Build one engine. Returns: its entry, and whether it uses plugins."""
    manifest = bundle.manifest
    graph, joined, engine = (work / f"{name}.{kind}" for kind in ("onnx", "joined", "engine"))
    write_joined(lowered.model, lowered.joined, bundle.directory, joined)
    graph.write_bytes(lowered.model.SerializeToString())
    products = {node.name for node in portable.graph.node if node.op_type == "MatMul"}  # lowering may add small ones
    plugin_ops = {op for op, form in lowered.forms.items() if form == "plugin"}
    plugin_ops |= {node.op_type for node in lowered.model.graph.node} & set(STEP_OPS)
    job = Job(
        backend=backend,
        graph=str(graph),
        beside=str(bundle.graph_path(name)),
        engine=str(engine),
        targets=targets,
        profiles=tuple(input_ranges(lowered.model, profile) for profile in profiles),
        plugins=str(library) if plugin_ops and library else None,
        plugin_nodes=tuple(node.name for node in lowered.model.graph.node if node.op_type in plugin_ops),
        products=tuple(node.name for node in lowered.model.graph.node if node.name in products),
        timing_cache=str(timing_cache) if timing_cache else None,
        tf32=exact_in_tf32(Graph(lowered.model.graph)),
    )
    built = run_job(job, name, on_progress)
    graph.unlink()
    joined.unlink(missing_ok=True)
    write_plan(engine, [step_from(step) for step in built.steps])
    entry = EngineGraph(
        file=engine.name,
        sha256=sha256_of(engine),
        size_bytes=engine.stat().st_size,
        graph_sha256=manifest.graphs[name].sha256,
        weights_sha256=manifest.weights.sha256,
        forms=dict(lowered.forms),
        layers=dict(built.layers),
        products=dict(Counter(built.products.values())),
        widened=widened_weights(lowered, built.products),
        inputs=tuple(tensor_info(value) for value in lowered.model.graph.input),
        outputs=tuple(tensor_info(value) for value in lowered.model.graph.output),
        build_seconds=round(built.seconds, 2),
        peak_bytes=built.peak_bytes,
    )
    return entry, bool(plugin_ops)


def _lower(
    bundle: Bundle,
    name: str,
    portable: onnx.ModelProto,
    capacity: int,
    kv_layout: KvLayout,
    profiles: Sequence[EngineProfile],
    library: Path | None,
) -> lowering.Lowered:
    load_zero_points(portable, bundle.directory)
    try:
        return lowering.lower(
            portable,
            bundle.manifest,
            capacity=capacity,
            rows=most_rows(profiles),
            plugins=(*PLUGIN_OPS, *STEP_OPS) if library is not None else (),
            kv_layout=kv_layout,
            step=(profiles[0].batch.most, profiles[0].tokens.most) if kv_layout == "step" else None,
        )
    except LayoutError as error:
        raise not_as_expected(bundle.graph_path(name), bundle.manifest, error) from error


def input_ranges(model: onnx.ModelProto, profile: EngineProfile) -> Ranges:
    """Smallest, usual and largest shape of every dynamic input of a lowered graph; for `k` on the host, its values."""
    named = {
        "batch": profile.batch,
        "sequence": profile.tokens,
        WINDOW: profile.window,
        # the last column in generation, all of them in verification
        LOGITS_COLUMNS: Sizes(1, 1, profile.tokens.most),
        **_growing(profile),
    }
    ranges: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for value in model.graph.input:
        axes = value.type.tensor_type.shape.dim
        if value.name == K:
            most = profile.batch.most * profile.tokens.most
            ranges[value.name] = ((0,), (profile.batch.usual * profile.tokens.usual,), (most,))
        elif value.name.startswith(RUN):  # no rows, or all
            ranges[value.name] = ((0,), (profile.batch.usual * profile.tokens.usual,), (most_rows([profile]),))
        elif any(axis.dim_param for axis in axes):
            least, usual, most_shape = (
                tuple(named[axis.dim_param][end] if axis.dim_param else axis.dim_value for axis in axes)
                for end in range(3)
            )
            ranges[value.name] = (least, usual, most_shape)
    return ranges


def _growing(profile: EngineProfile) -> dict[str, Sizes]:
    """Sizes of growing K and V, in columns, before a call and after it.

    TensorRT tests the minima of all axes together, and likewise the usual sizes and the maxima, so these must be
    consistent: with the most tokens after the most columns, the total exceeds the profile's window.
    """
    tokens, window = profile.tokens, profile.window
    past = Sizes(window.least - tokens.least, window.usual - tokens.usual, window.most - tokens.least)
    return {"past": past, "total": Sizes(window.least, window.usual, past.most + tokens.most)}


def check_backend(backend: Backend) -> Any:
    """Check that everything needed for building is installed. Returns: the Python module of the backend.

    Raises:
        EngineError: something is missing. A missing GPU is reported first, since it cannot be installed.
    """
    if backend == "tensorrt" and cuda.device() is None:
        raise EngineError(
            "backend tensorrt: builds on the GPU that an engine is for, but this machine has none",
            expected="an NVIDIA GPU with its driver",
            found=cuda.why_not(),
            todo='pip install "gsx[tensorrt]" on a machine with a GPU; gsx build --backend tensorrt-rtx needs none',
        )
    if find_spec("polygraphy") is None:
        raise EngineError(
            "gsx build needs Polygraphy, which is not installed",
            expected="the package polygraphy",
            todo='pip install "gsx[tensorrt]"',
        )
    module = load_module(backend)
    found = tuple(int(part) for part in module.__version__.split(".")[:2])
    if backend == "tensorrt" and found < OLDEST_TENSORRT:
        raise EngineError(
            "backend tensorrt: this TensorRT lacks ops that engines consist of",
            expected=f"TensorRT {OLDEST_TENSORRT[0]}.{OLDEST_TENSORRT[1]} or later (TensorScatter, RMSNormalization)",
            found=module.__version__,
            todo="pip install --upgrade tensorrt; or gsx build --backend tensorrt-rtx",
        )
    return module


def _targets(module: ModuleType, backend: Backend, targets: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Compute capabilities to build for, and the name of this machine's GPU (None: there is none)."""
    device = cuda.device()
    if backend == "tensorrt":
        assert device is not None
        if targets and {target.replace(".", "") for target in targets} != {device.capability}:
            raise UsageError(
                "--target: backend tensorrt builds only for the GPU of this machine",
                expected=device.capability,
                found=", ".join(targets),
                todo="gsx build --backend tensorrt-rtx builds for others",
            )
        return (device.capability,), device.name
    known = known_targets(module)
    wanted = {target: target.replace(".", "").removeprefix("sm") for target in targets}
    if unknown := [target for target in targets if wanted[target] not in known]:
        raise UsageError(
            "--target: this TensorRT-RTX does not build for this compute capability",
            expected=", ".join(map(dotted, known)),
            found=" and ".join(unknown),
            todo="repeat --target for each one; other GPUs need gsx build --backend tensorrt on a machine that has one",
        )
    name = device.name if device else None
    if wanted:
        return tuple(sorted(set(wanted.values()), key=int)), name
    if device is not None and device.capability in known:
        return (device.capability,), name
    return default_targets(module), name


def _with_fp8(
    bundle: Bundle, module: ModuleType, backend: Backend, requested: Sequence[str], chosen: tuple[str, ...]
) -> tuple[str, ...]:
    """The chosen targets that have FP8 products; a requested target, or this machine's GPU, must have them."""
    having = tuple(target for target in chosen if has_fp8(target))
    if having == chosen or (having and not requested):
        return having
    known = [dotted(target) for target in known_targets(module) if has_fp8(target)] if backend == "tensorrt-rtx" else []
    raise EngineError(
        f"bundle {bundle.directory}: has FP8 products, which not all targets support",
        expected="compute capability 8.9 (Ada), 9.0 (Hopper), 10.0 or above (Blackwell)"
        + (f"; this TensorRT-RTX builds for {', '.join(known)}" if known else ""),
        found=", ".join(dotted(target) for target in chosen if target not in having),
        todo="gsx export MODEL --int8 makes a bundle for other GPUs",
    )


def _shapes(
    bundle: Bundle, backend: Backend, context: int | None, batch: int, profiles: Sequence[str]
) -> tuple[int, tuple[EngineProfile, ...]]:
    longest = bundle.manifest.decoder.max_positions
    if context is not None and not 2 <= context <= longest:
        raise UsageError(
            "--context is out of range", expected=f"2 to {longest}, the model's context", found=str(context)
        )
    if batch < 1:
        raise UsageError("--batch is out of range", expected="at least 1", found=str(batch))
    capacity = context or min(longest, BUILD_CONTEXT)
    if not profiles:
        return capacity, (default_profiles if backend == "tensorrt" else one_profile)(capacity, batch)
    made = tuple(parse_profile(text, capacity=capacity, batch=batch) for text in profiles)
    names = [profile.name for profile in made]
    if len(set(names)) < len(names):
        raise UsageError("--profile: two profiles have the same name", found=", ".join(names))
    return capacity, made


def _step(
    bundle: Bundle,
    backend: Backend,
    context: int | None,
    batch: int,
    profiles: Sequence[str],
    kv_layout: KvLayout,
    tokens: int,
) -> tuple[KvLayout, int, tuple[EngineProfile, ...]]:
    """Layout, capacity and the only profile of engines for steps of one size.

    Raises:
        UsageError: a size that no step has, other options that do not go with it, or a capacity that the engines for
            all other calls do not have, since both use the same buffers.
    """
    if profiles or kv_layout == "growing":
        raise UsageError(
            "--step has a profile and a K/V layout of its own",
            expected="--step with --batch and --context",
            found="--profile" if profiles else "--kv-layout growing",
        )
    if tokens < 1 or tokens * batch > MOST_STEP_ROWS:
        raise UsageError(
            "--step is for few tokens",
            expected=f"1 to {MOST_STEP_ROWS} of all sequences together",
            found=f"{batch} x {tokens}",
            todo="leave it out: the other engines take calls of any size",
        )
    capacity, _ = _shapes(bundle, backend, context, batch, ())
    others = [one.capacity for one in bundle.manifest.engines.values() if one.backend == backend]
    if others and capacity not in others:
        raise UsageError(
            "--step: the engines for other calls use the same K/V buffers, and have another capacity",
            expected=" or ".join(map(str, dict.fromkeys(others))),
            found=str(capacity),
            todo=f"--context {others[0]}",
        )
    sizes = [Sizes(size, size, size) for size in (batch, tokens, capacity)]
    return "step", capacity, (EngineProfile(name="step", batch=sizes[0], tokens=sizes[1], window=sizes[2]),)


def _load(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(str(bundle.graph_path(name)), load_external_data=False)


def widened_weights(lowered: lowering.Lowered, products: Mapping[str, str]) -> tuple[str, ...]:
    """The bundle's weights of 8 bits whose products an engine computes in a wider type.

    Args: products: the type of each product, by its node; `UNKNOWN` is no sign of it.
    """
    found = [
        weights.input[0]
        for product, _, weights in quantized_products(Graph(lowered.model.graph))
        if products[product.name] not in (*EIGHT_BITS, UNKNOWN)
    ]
    parts = {name: [part.name for part in tensors] for name, tensors in lowered.joined.items()}
    return tuple(part for name in found for part in parts.get(name, [name]))


def weight_bytes(lowered: lowering.Lowered) -> int:
    """Bytes of the weights outside a graph that it reads, those that are put together for it included."""
    return sum(map(_length, lowered.model.graph.initializer)) + joined_bytes(lowered)


def joined_bytes(lowered: lowering.Lowered) -> int:
    """Bytes of the constants that are put together for a graph, and written beside it while it is built."""
    read = {tensor.name for tensor in lowered.model.graph.initializer}
    return sum(_length(part) for name, parts in lowered.joined.items() if name in read for part in parts)


def _length(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor that are outside the graph."""
    return sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def _timing_cache(version: str, gpu: str | None) -> Path | None:
    """Where TensorRT's timings are kept; None if the cache folder cannot be written."""
    place = cache_folder() / "timing"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place / f"{version}-{(gpu or 'none').replace(' ', '_')}.cache"


def _library(plugins: Literal["auto", "none"] | Path) -> Path | None:
    if plugins == "none":
        return None
    if isinstance(plugins, Path):
        if not plugins.is_file():
            raise UsageError(f"{plugins}: there is no such plugin library", todo="gsx plugins build makes one")
        return plugins.resolve()
    return find_library()


def _plugin_entry(library: Path) -> PluginLibrary:
    record = record_of(library)
    return PluginLibrary(sha256=library_hash(library), source_hash=record.source_hash if record else "unknown")
