"""`gsx export`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gsx.cli.build import build_engines, print_engines
from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, remark, size, table
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx_engines.bundle.bundle import Bundle
    from gsx_engines.bundle.drafts import DraftEntry
    from gsx_engines.bundle.policy import Policy
    from gsx_engines.tensorrt.backend import Backend


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(export)


def export(
    model: Annotated[str, typer.Argument(help="A model directory or a hub id.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The bundle's directory.", show_default="MODEL's name + -gsx"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Share of (token, branch) pairs to keep, above 0 and up to 1.", show_default="1.0"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="The keep rule: gateskip, router, layers[:SET], unified:SPEEDUP, ffn-skip, calm:..., dense "
            "(docs/policies.md).",
            show_default="gateskip with gates, router with routers, else dense",
        ),
    ] = None,
    select: Annotated[
        Literal["threshold", "rank"], typer.Option(help="How GateSkip chooses kept tokens.")
    ] = "threshold",
    kv_policy: Annotated[
        Literal["compute", "copy", "none"] | None,
        typer.Option(
            help="K and V of skipped tokens: their own, the layer below's, or none.",
            show_default="none for sets of layers, else compute",
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="Type of weights and activations.")
    ] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to find the thresholds on.", show_default="a text that ships with gsx"),
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="How much of it to use.", show_default="8192")] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="For self-speculative decoding: exit:E, auto (the fastest exit here), budget:B, layers:SET, "
            "or layers:auto (a set that is searched).",
            show_default="none",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Run the large products in INT8.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Run the large products in FP8 (E4M3), for GPUs.")] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="With --int8: weights alone; activations stay as they are.")
    ] = False,
    keep_precision: Annotated[
        str | None,
        typer.Option(
            help="Layers to leave out of INT8 or FP8: auto (by measurement), none, or names with commas.",
            show_default="with gates the first",
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(help="Quality limit of INT8 or FP8, relative.", show_default="0.01 with --keep-precision auto"),
    ] = None,
    max_flipped: Annotated[
        float | None,
        typer.Option(
            help="Limit of the share of decisions that INT8 or FP8 turns.",
            show_default="0.01 with --keep-precision auto",
        ),
    ] = None,
    kv_cache: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Type that K and V are kept in, on ONNX Runtime.", show_default="that of the activations"),
    ] = None,
    build: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Build engines too, with gsx build's defaults.", show_default="none"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Export a checkpoint to a bundle: calibrated thresholds, ONNX with custom ops, one weights file.

    Example: gsx export examples/model --budget 0.7 -o out/demo

    Example: gsx export examples/model --budget 0.7 --int8 --keep-precision auto -o out/int8

    Example: gsx export examples/model --budget 0.7 --precision fp16 --build tensorrt-rtx -o out/engines
    """
    quiet_libraries()
    started = time.monotonic()
    target = output if output is not None else default_output(model)
    if calibration_tokens is not None and calibration_tokens < 1:
        raise typer.BadParameter(f"{calibration_tokens} is not a positive number", param_hint="--calibration-tokens")
    if policy is not None and len(policy) > 1:
        raise typer.BadParameter(f"{' and '.join(policy)} exclude each other: give one", param_hint="--policy")
    if int8 and fp8:
        raise typer.BadParameter("a graph has one of the two", param_hint="--int8 --fp8")
    if weights_only and not int8:
        raise typer.BadParameter("belongs to --int8", param_hint="--weights-only")
    for name, given in (
        ("--keep-precision", keep_precision),
        ("--max-perplexity-increase", max_perplexity_increase),
        ("--max-flipped", max_flipped),
    ):
        if given is not None and not (int8 or fp8):
            raise typer.BadParameter("belongs to --int8 or --fp8", param_hint=name)
    if kv_cache is not None and build is not None:
        raise typer.BadParameter("engines keep K and V in 16- and 32-bit floats alone", param_hint="--kv-cache --build")
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx.workflows.export import export as export_bundle
            from gsx.workflows.quantize import Quantize
            from gsx_engines.building.build import check_backend
            from gsx_exporter.calibration import DEFAULT_TOKENS
            from gsx_exporter.quantization.statistics import default_cache

        if build is not None:
            check_backend(build)  # before an export that may take long
        quantize = None
        if int8 or fp8:
            quantize = Quantize(
                "fp8" if fp8 else "int8-weights" if weights_only else "int8",
                keep_precision=tuple(filter(None, (keep_precision or "").split(","))),
                max_perplexity_increase=max_perplexity_increase,
                max_flipped=max_flipped,
                cache=default_cache(),
            )
        bundle = export_bundle(
            model,
            target,
            policy=policy[0] if policy else None,
            budget=budget,
            select=select,
            kv_policy=kv_policy,
            precision=precision,
            calibration=calibration,
            calibration_tokens=calibration_tokens if calibration_tokens is not None else DEFAULT_TOKENS,
            draft=draft,
            quantize=quantize,
            kv_cache=kv_cache,
            overwrite=overwrite,
            on_progress=line.show,
        )
    summary = summary_of(bundle, time.monotonic() - started)
    if not as_json:
        _print(summary)
    if build is not None:
        summary["engines"] = _build(target, build, as_json)
    if as_json:
        print_json(summary)


def _build(bundle: Path, backend: Backend, as_json: bool) -> dict[str, Any]:
    """Engines for a bundle that was just exported, as plain values. Where they fail, the bundle stays."""
    from gsx_plugins.errors import GsxError

    try:
        name, entry = build_engines(bundle, backend=backend)
    except (GsxError, KeyboardInterrupt):
        remark(f"the bundle {bundle} is complete, without engines")
        raise
    if not as_json:
        print_engines(bundle, entry)
    return {name: entry.model_dump(mode="json")}


def default_output(model: str) -> Path:
    """`./<model's name>-gsx`."""
    return Path(f"{Path(model).expanduser().resolve().name or 'model'}-gsx")


def summary_of(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """What an export made, as plain values."""
    manifest = bundle.manifest
    selection = manifest.selection
    kept = None
    if selection is not None and selection.mode == "threshold":
        kept = next(p.kept_share for p in selection.grid if p.budget == selection.budget)
    return {
        "bundle": str(bundle.directory),
        "source": manifest.source.model,
        "family": manifest.decoder.family,
        "layers": manifest.decoder.num_layers,
        "precision": manifest.precision,
        "policy": manifest.policy.name if manifest.policy else None,
        "select": selection.mode if selection else None,
        "kv_policy": manifest.kv_policy,
        "quantization": manifest.quantization.scheme if manifest.quantization else None,
        "kv_cache": manifest.kv_cache.type if manifest.kv_cache else None,
        "kept_high": list(manifest.quantization.kept_high) if manifest.quantization else None,
        "confidence": _confidence_of(manifest.policy) if manifest.policy else None,
        "exits": list(manifest.policy.exits) if manifest.policy else None,
        "parameters": manifest.policy.parameters if manifest.policy else None,
        "budget": selection.budget if selection else None,
        "kept_share": kept,
        "draft": _draft_of(manifest.draft) if manifest.draft else None,
        "files": {path.name: path.stat().st_size for path in sorted(bundle.directory.iterdir())},
        "seconds": round(seconds, 2),
    }


def _print(summary: dict[str, Any]) -> None:
    console = out()
    console.print(
        f"{summary['bundle']}: {summary['family']}, {summary['layers']} layers, {summary['precision']}, "
        f"in {summary['seconds']:.1f} s"
    )
    if summary["policy"] is None:
        console.print("a dense model: nothing is skipped")
    elif summary["confidence"] is not None:
        _print_confidence(summary["confidence"], summary["exits"])
    elif summary["budget"] is None:
        console.print(f"policy {summary['policy']}: layers {summary['parameters']['layers']} run by default")
    elif summary["kept_share"] is None:
        console.print(f"{summary['select']} selection, budget {summary['budget']:g}")
    else:
        how = f"{summary['select']} selection" if summary["policy"] == "gateskip" else policy_name(summary)
        console.print(
            f"{how}, budget {summary['budget']:g}: "
            f"{summary['kept_share']:.3f} of (token, branch) pairs kept on the calibration text"
        )
    if summary["draft"] is not None:
        _print_draft(summary["draft"])
    if summary["quantization"] is not None:
        kept = f", {len(summary['kept_high'])} matrices left in high precision" if summary["kept_high"] else ""
        console.print(f"{summary['quantization']} products{kept}")
    if summary["kv_cache"] is not None:
        console.print(f"K and V are kept in {summary['kv_cache']} on ONNX Runtime")
    rows = [(name, size(count)) for name, count in summary["files"].items()]
    console.print(table(None, ("file", "size"), rows, right=1))
    console.print(f"next: gsx verify {summary['bundle']}")


def _confidence_of(policy: Policy) -> dict[str, Any] | None:
    return policy.confidence.model_dump(mode="json") if policy.confidence else None


def _print_confidence(values: dict[str, Any], exits: list[int]) -> None:
    """When tokens leave, and what is promised of it: the walk as a table."""
    console = out()
    depths = ", ".join(map(str, exits))
    at = "infinity (nothing leaves)" if values["threshold"] is None else f"{values['threshold']:g}"
    console.print(
        f"policy calm: a token leaves after {depths} layers where its {values['measure']} confidence reaches {at}"
    )
    found = values["guarantee"]
    if found is None:
        console.print("the threshold was given: nothing is promised about the risk")
        return
    rows = [
        (
            f"{one['threshold']:g}",
            f"{one['mean_risk']:.4f}",
            f"{one['p_value']:.2g}",
            f"{one['kept_share']:.1%}",
            "yes" if one["accepted"] else "no",
        )
        for one in found["tested"]
    ]
    console.print(table(None, ("threshold", f"{found['risk']} risk", "p-value", "kept", "holds"), rows, right=1))
    console.print(
        f"with probability {found['confidence']:g} the mean {found['risk']} risk is at most {found['tolerance']:g} "
        f"on text like the calibration text ({found['prompts']} prompts of {found['prompt_tokens']} tokens)"
    )


def policy_name(summary: Mapping[str, Any]) -> str:
    """A policy with its parameters of one value, from an export's or a bundle's facts."""
    single = {name: value for name, value in summary["parameters"].items() if not isinstance(value, list)}
    parameters = ", ".join(f"{name} {value}" for name, value in single.items())
    return f"{summary['policy']} ({parameters})" if parameters else str(summary["policy"])


def _draft_of(entry: DraftEntry) -> dict[str, Any]:
    values = entry.model_dump(mode="json")
    measured = [row | {"draft": str(one.draft)} for row, one in zip(values["measured"], entry.measured, strict=True)]
    return {"draft": str(entry.draft), "length": values["length"], "measured": measured}


def _print_draft(entry: dict[str, Any]) -> None:
    """The draft, and where it was measured, the table that it was chosen from."""
    console = out()
    if not entry["measured"]:
        console.print(f"draft: {entry['draft']}")
        return
    rows = []
    for one in entry["measured"]:
        speeds = one["tokens_per_second"], one["plain_tokens_per_second"]
        cells = (one["draft"], str(one["length"]), f"{one['acceptance']:.1%}", *(f"{s:.1f}" for s in speeds))
        rows.append((*cells, f"{speeds[0] / speeds[1]:.2f}"))
    heads = ("draft", "length", "right", "tokens/s", "plain", "ratio")
    console.print(table("drafts, measured on the calibration text", heads, rows, right=1))
    best = max(one["tokens_per_second"] / one["plain_tokens_per_second"] for one in entry["measured"])
    note = "" if best > 1 else ": none was faster than plain decoding on this machine"
    console.print(f"draft: {entry['draft']}{note}")
