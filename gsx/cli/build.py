"""`gsx build`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gsx.cli.console import ProgressLine, out, print_json, remark, size, table
from gsx.cli.options import BundleArgument, JsonOption
from gsx.cli.signals import loading
from gsx_engines.defaults import BUILD_CONTEXT

if TYPE_CHECKING:
    from gsx_engines.bundle.engine_entry import EngineEntry
    from gsx_engines.tensorrt.cuda import Device

# A warning names at most this many products and counts the rest.
_MOST_NAMED = 4


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(build)


def build(
    bundle: BundleArgument,
    backend: Annotated[
        Literal["tensorrt", "tensorrt-rtx"],
        typer.Option(help="tensorrt-rtx builds on any machine; tensorrt builds on the GPU that it is for."),
    ] = "tensorrt-rtx",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute capability, e.g. 8.9; may be given several times.", show_default="this GPU, or 8.0 and later"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Columns of the K/V buffers.", show_default=f"the model's, at most {BUILD_CONTEXT}"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Largest number of sequences in a call.")] = 1,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:TOKENS[:BATCH], each LEAST-USUAL-MOST; may be given several times.",
            show_default="prefill and decode; RTX: one for both",
        ),
    ] = None,
    plugins: Annotated[str, typer.Option(help="auto, none, or a plugin library.", metavar="auto|none|FILE")] = "auto",
    kv_layout: Annotated[
        Literal["in-place", "growing"],
        typer.Option(
            help="in-place: K/V are written in place, for gsx. growing: past in, present out, for other programs."
        ),
    ] = "in-place",
    step: Annotated[
        int | None,
        typer.Option(
            help="Tokens of each sequence in a step: engines for calls of exactly this size, beside the others.",
            show_default="engines for calls of all sizes",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build TensorRT engines from a bundle's graphs and store them in the bundle.

    Example: gsx build out/demo --backend tensorrt-rtx --target 8.9
    """
    name, entry = build_engines(
        bundle,
        backend=backend,
        targets=target or (),
        context=context,
        batch=batch,
        profiles=profile or (),
        plugins=plugins if plugins in ("auto", "none") else Path(plugins),
        kv_layout=kv_layout,
        step=step,
    )
    if as_json:
        print_json({"name": name, **entry.model_dump(mode="json")})
    else:
        print_engines(bundle, entry)


def build_engines(bundle: Path, **options: Any) -> tuple[str, EngineEntry]:
    """`gsx.build` with progress and warnings on stderr."""
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx import build as build_in

        name, entry = build_in(
            bundle,
            on_progress=line.show,
            **options,
        )
    from gsx_engines.tensorrt import cuda

    for warning in warnings_of(entry, None if options.get("targets") else cuda.device()):
        remark(warning)
    return name, entry


def warnings_of(entry: EngineEntry, device: Device | None = None) -> list[str]:
    """What a user must not overlook: engines that save nothing, or less than they could, or do not run here.

    Args:
        device: the GPU that the engines are meant for; None if they are for other machines.
    """
    forms = {form for graph in entry.graphs.values() for form in graph.forms.values()}
    warnings = []
    if device is not None and device.capability not in entry.targets:
        from gsx_engines.tensorrt.backend import dotted

        warnings.append(
            f"WARNING: these engines are NOT FOR THE GPU OF THIS MACHINE ({device.name}, {dotted(device.capability)}), "
            f"which {entry.backend} {entry.tensorrt_version} does not build for.\n"
            "  gsx build --backend tensorrt builds for it; gsx generate --backend torch runs the bundle without engines"
        )
    if widened := [f"{name}: {weights}" for name, graph in entry.graphs.items() for weights in graph.widened]:
        more = f" and {len(widened) - _MOST_NAMED} more" if len(widened) > _MOST_NAMED else ""
        several = "products DO NOT RUN" if len(widened) > 1 else "product DOES NOT RUN"
        warnings.append(
            f"WARNING: {len(widened)} quantized {several} IN 8 BITS in this engine: the results are right, but it is "
            f"slower than it could be.\n  {', '.join(widened[:_MOST_NAMED])}{more}"
        )
    if all(profile.tokens.least > 1 for profile in entry.profiles):
        warnings.append(
            "WARNING: NO PROFILE TAKES CALLS OF ONE TOKEN, which generation makes.\n"
            "  add --profile decode:1, or let another profile begin at 1"
        )
    if "mask" in forms:
        warnings.append(
            "WARNING: without the plugins, selection became a mask: the results are right, but NOTHING IS SAVED.\n"
            "  gsx plugins build makes the plugin library; then run gsx build again"
        )
    return warnings


def products_line(products: Mapping[str, int]) -> str:
    """An engine's matrix products, counted by the type that they are computed in."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(products.items())) or "unknown"


def print_engines(bundle: Path, entry: EngineEntry) -> None:
    """Print what was built, as tables."""
    from gsx_engines.tensorrt import cuda
    from gsx_engines.tensorrt.backend import dotted

    console = out()
    console.print(
        f"{bundle}: {entry.backend} {entry.tensorrt_version}, for {', '.join(map(dotted, entry.targets))}, "
        f"{entry.precision}, {entry.capacity} columns of K/V, {entry.kv_layout}"
    )
    rows = [
        (
            graph,
            size(built.size_bytes),
            f"{built.build_seconds:.1f} s",
            size(built.peak_bytes),
            products_line(built.products),
            ", ".join(f"{op} {form}" for op, form in built.forms.items()) or "none",
        )
        for graph, built in entry.graphs.items()
    ]
    console.print(table(None, ("engine", "size", "built in", "peak memory", "products", "ops"), rows))
    ranges: list[tuple[str, ...]] = [
        (profile.name, *("-".join(map(str, axis)) for axis in (profile.batch, profile.tokens, profile.window)))
        for profile in entry.profiles
    ]
    console.print(table(None, ("profile", "batch", "tokens", "window"), ranges))
    if entry.kv_layout == "in-place":
        where = "" if cuda.device() else ", on a machine with a GPU"
        console.print(f"next{where}: gsx generate {bundle} PROMPT --backend {entry.backend}")
    elif entry.kv_layout == "step":
        console.print("gsx generate and gsx serve take them for calls of this size, beside engines for all others")
    elif entry.backend == "tensorrt":
        console.print(f"next: gsx triton {bundle} -o REPOSITORY --backend tensorrt-plan")
    else:
        console.print("inputs and outputs are those of the graphs; gsx itself only runs engines with K/V in place")
