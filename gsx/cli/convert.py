"""`gsx convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries
from gsx.cli.options import JsonOption
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx_exporter.convert import ConvertResult


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(convert)


def convert(
    file: Annotated[Path, typer.Argument(help="The file saved in training: .pt or safetensors.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new model directory.", show_default=False)],
    base: Annotated[
        str,
        typer.Option(help="The plain model that was trained: a directory or a hub id.", show_default=False),
    ],
    gate_input: Annotated[
        Literal["post_norm", "pre_norm"], typer.Option(help="What GateSkip's gates read.")
    ] = "post_norm",
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint of GateSkip, SkipGPT, D-LLM or FlexiDepth to a model directory.

    Example: gsx convert gateskip_42.pt -o my-model --base meta-llama/Llama-3.2-1B
    """
    quiet_libraries()
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx import convert as convert_file

        result = convert_file(file, output, base=base, gate_input=gate_input, on_progress=line.show)
    if as_json:
        print_json(result.to_dict())
        return
    console = out()
    console.print(f"{result.directory}: {result.tensors} tensors from a {result.layout}, {_kind(result)}")
    if result.left_out:
        console.print(f"left out: {', '.join(result.left_out)}")
    console.print(f"next: gsx export {result.directory} --budget 0.7")


def _kind(result: ConvertResult) -> str:
    gate, router = result.gate, result.router
    if gate is not None:
        return f"{gate.kind} gates on {' and '.join(gate.branches)}, reading {gate.input}"
    assert router is not None
    layers = "all layers" if router.layers is None else f"{len(router.layers)} layers"
    return f"routers on {layers}, one for each {router.decides}"
