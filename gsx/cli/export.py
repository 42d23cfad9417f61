"""`gsx export`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gsx.cli.build import build_engines, print_engines
from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, remark
from gsx.cli.export_summary import print_summary, summary_of
from gsx.cli.options import SHIPPED_TEXT, JsonOption, ModelArgument, OverwriteOption, grouped
from gsx.cli.signals import loading
from gsx_exporter.defaults import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from gsx.workflows.quantize import Quantize
    from gsx_engines.tensorrt.backend import Backend


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(export))


@dataclass(frozen=True)
class RuleOptions:
    """What is skipped."""

    budget: Annotated[
        float | None,
        typer.Option(help="Share of (token, branch) pairs to keep, above 0 and up to 1.", show_default="1.0"),
    ] = None
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="The keep rule: gateskip, router, layers[:SET], unified:SPEEDUP, ffn-skip, calm:..., dense "
            "(docs/policies.md).",
            show_default="gateskip with gates, router with routers, else dense",
        ),
    ] = None
    select: Annotated[Literal["threshold", "rank"], typer.Option(help="How GateSkip selects tokens.")] = "threshold"
    kv_policy: Annotated[
        Literal["compute", "copy", "none"] | None,
        typer.Option(
            help="K and V of skipped tokens: computed, copied from the layer below, or none.",
            show_default="none for sets of layers, else compute",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `gsx.export`, which takes one policy."""
        if self.policy is not None and len(self.policy) > 1:
            raise typer.BadParameter(f"{' and '.join(self.policy)} exclude each other: give one", param_hint="--policy")
        return {**vars(self), "policy": self.policy[0] if self.policy else None}


@dataclass(frozen=True)
class QuantizationOptions:
    """INT8, INT4 and FP8."""

    int8: Annotated[bool, typer.Option("--int8", help="Run the large products in INT8.")] = False
    int4: Annotated[bool, typer.Option("--int4", help="Store the weights of the large products in 4 bits.")] = False
    fp8: Annotated[bool, typer.Option("--fp8", help="Run the large products in FP8 (E4M3), for GPUs.")] = False
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="With --int8: only the weights; activations stay as they are.")
    ] = False
    keep_precision: Annotated[
        str | None,
        typer.Option(
            help="Layers to leave out, by names separated by commas; none: leave nothing out, whatever it costs.",
            show_default="by measurement; with gates the first",
        ),
    ] = None
    max_divergence: Annotated[
        float | None,
        typer.Option(help="Largest mean KL divergence in nats.", show_default="as gsx verify"),
    ] = None
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(help="Largest relative change of perplexity, up or down.", show_default="as gsx verify"),
    ] = None
    max_flipped: Annotated[
        float | None,
        typer.Option(help="Largest share of decisions that may flip.", show_default="as gsx verify"),
    ] = None

    @property
    def any(self) -> bool:
        """Whether anything is quantized."""
        return self.int8 or self.int4 or self.fp8

    def check(self) -> None:
        """Refuse options that cannot be combined."""
        given = [name for name in ("int8", "int4", "fp8") if getattr(self, name)]
        if len(given) > 1:
            raise typer.BadParameter("give only one of them", param_hint=" ".join(f"--{name}" for name in given))
        if self.weights_only and not self.int8:
            raise typer.BadParameter("belongs to --int8", param_hint="--weights-only")
        for name in ("keep_precision", "max_divergence", "max_perplexity_increase", "max_flipped"):
            if getattr(self, name) is not None and not self.any:
                raise typer.BadParameter("belongs to --int8, --int4 or --fp8", param_hint=f"--{name.replace('_', '-')}")

    def quantize(self) -> Quantize | None:
        """The argument of `gsx.export`, with statistics kept in the user's cache."""
        if not self.any:
            return None
        from gsx import Quantize
        from gsx_exporter.quantization.statistics import default_cache

        return Quantize(
            self._scheme(),
            keep_precision=tuple(filter(None, (self.keep_precision or "").split(","))),
            max_divergence=self.max_divergence,
            max_perplexity_increase=self.max_perplexity_increase,
            max_flipped=self.max_flipped,
            cache=default_cache(),
        )

    def _scheme(self) -> Literal["int8", "int8-weights", "int4", "fp8"]:
        if self.fp8:
            return "fp8"
        if self.int4:
            return "int4"
        return "int8-weights" if self.weights_only else "int8"


def export(
    model: ModelArgument,
    rule: RuleOptions,
    numbers: QuantizationOptions,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The bundle's directory.", show_default="MODEL's name + -gsx"),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="Type of weights and activations.")
    ] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to calibrate the thresholds on.", show_default=SHIPPED_TEXT),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it to use.", min=1)] = CALIBRATION_TOKENS,
    draft: Annotated[
        str | None,
        typer.Option(
            help="For self-speculative decoding: exit:E, auto (the fastest exit here), budget:B, layers:SET, "
            "or layers:auto (searches for a set).",
            show_default="none",
        ),
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With an exit: the draft chooses among the N tokens that the calibration text has most often.",
            show_default="all tokens",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest text, in tokens. With LongRoPE: above the original context the long factors are used.",
            show_default="what the model was made for; with LongRoPE its original context",
        ),
    ] = None,
    kv_cache: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Type in which ONNX Runtime stores K and V.", show_default="that of the activations"),
    ] = None,
    build: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Also build engines, with gsx build's defaults.", show_default="none"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(help="Also write it to this repository of the Hugging Face hub.", show_default="none"),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to a bundle: calibrated thresholds, ONNX with custom ops, one weights file.

    Example: gsx export examples/model --budget 0.7 -o out/demo

    Example: gsx export examples/model --budget 0.7 --int8 -o out/int8

    Example: gsx export examples/model --budget 0.7 --precision fp16 --build tensorrt-rtx -o out/engines
    """
    quiet_libraries()
    started = time.monotonic()
    target = output if output is not None else default_output(model)
    rule_arguments = rule.arguments()
    numbers.check()
    if kv_cache is not None and build is not None:
        raise typer.BadParameter("engines store K and V only in 16- and 32-bit floats", param_hint="--kv-cache --build")
    kept = f"{target} is as it was" + (", and statistics that were complete are kept" if numbers.any else "")
    with ProgressLine(kept=kept) as line:
        line.update("starting")
        with loading():
            from gsx import export as export_bundle
            from gsx_engines.building.build import check_backend

        if build is not None:
            check_backend(build)  # before an export that may take long
        bundle = export_bundle(
            model,
            target,
            **rule_arguments,
            precision=precision,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            context=context,
            draft=draft,
            draft_vocabulary=draft_vocabulary,
            quantize=numbers.quantize(),
            kv_cache=kv_cache,
            overwrite=overwrite,
            on_progress=line.show,
        )
    summary = summary_of(bundle, time.monotonic() - started)
    for note in summary["notes"]:
        remark(f"note: {note}")
    if not as_json:
        print_summary(summary)
    if build is not None:
        summary["engines"] = _build(target, build, as_json)
    if push is not None:
        summary["pushed"] = _push(target, push, as_json)
    if as_json:
        print_json(summary)


def _build(bundle: Path, backend: Backend, as_json: bool) -> dict[str, Any]:
    """Engines for a bundle that was just exported, as plain values. If the build fails, the bundle stays."""
    from gsx_plugins.errors import GsxError

    try:
        name, entry = build_engines(bundle, backend=backend)
    except (GsxError, KeyboardInterrupt):
        remark(f"the bundle {bundle} is complete, without engines")
        raise
    if not as_json:
        print_engines(bundle, entry)
    return {name: entry.model_dump(mode="json")}


def _push(bundle: Path, repo: str, as_json: bool) -> str:
    """Write a bundle that was just exported to the hub. Returns: the commit's address."""
    from gsx import push

    with ProgressLine(kept=f"the bundle {bundle} is complete") as line:
        address = push(bundle, repo, on_progress=line.show)
    if not as_json:
        out().print(f"pushed to {address}")
    return address


def default_output(model: str) -> Path:
    """`./<model's name>-gsx`."""
    return Path(f"{Path(model).expanduser().resolve().name or 'model'}-gsx")
