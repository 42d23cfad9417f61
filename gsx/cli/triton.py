"""`gsx triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gsx.cli.console import print_json
from gsx.cli.options import BundleArgument, JsonOption
from gsx.cli.signals import loading
from gsx_engines.defaults import SERVED_REQUESTS, WAITING_REQUESTS


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(triton)


def triton(
    bundle: BundleArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The model repository to write.", show_default=False)
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(help="Query a running server, and compare its tokens with the bundle's.", metavar="URL"),
    ] = None,
    name: Annotated[str, typer.Option(help="The model's name.")] = "gsx",
    backend: Annotated[
        Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-plan"],
        typer.Option(
            help="The runtime; TensorRT needs engines in the bundle (gsx build). tensorrt-plan: only the engines, for "
            "Triton's own TensorRT backend (gsx build --kv-layout growing)."
        ),
    ] = "onnxruntime",
    slots: Annotated[int, typer.Option(help="Requests processed at once, in steps of one batch.")] = SERVED_REQUESTS,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused.")] = WAITING_REQUESTS,
    context: Annotated[
        int | None,
        typer.Option(help="Largest number of tokens of a request, prompt and new ones.", show_default="the model's"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of ONNX Runtime.", show_default="all but one processor, for the server")
    ] = None,
    openai: Annotated[
        bool, typer.Option("--openai", help="Take requests as Triton's OpenAI front end sends them.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="GPUs that get an instance each, e.g. 0,2; with TensorRT.", show_default="all", metavar="LIST"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model repository for Triton Inference Server, or check a server that runs one.

    Example: gsx triton out/demo -o out/models
    """
    from gsx_plugins.errors import UsageError

    if (output is None) == (check is None):
        raise UsageError("what to do is unclear", expected="-o REPOSITORY or --check URL")
    with loading():
        from gsx import check_server
        from gsx import triton as write
    if check is not None:
        count = check_server(bundle, check, name=name)
        print_json({"url": check, "tokens_equal": count}) if as_json else typer.echo(
            f"{check}: {count} tokens are equal"
        )
        return
    assert output is not None
    if backend == "tensorrt-plan":
        others = (slots, queue, context, threads, openai, gpus)
        if others != (SERVED_REQUESTS, WAITING_REQUESTS, None, None, False, None):
            raise UsageError(
                "--backend tensorrt-plan: the engines are served as they were built",
                expected="no --slots, --queue, --context, --threads, --openai and --gpus",
                todo="gsx build --batch and --context set what an engine takes",
            )
        _write_plans(bundle, output, name, as_json)
        return
    model = write(
        bundle,
        output,
        name=name,
        backend=backend,
        slots=slots,
        queue=queue,
        context=context,
        threads=threads,
        openai=openai,
        gpus=_numbers(gpus),
    )
    if as_json:
        print_json({"repository": str(output), "model": str(model)})
        return
    typer.echo(f"{model}: a decoupled model of the Python backend on {backend}")
    typer.echo(f"its Python needs:  pip install -r {model / 'requirements.txt'}")
    check_it = f"gsx triton {bundle} --check http://localhost:8000" + (f" --name {name}" if name != "gsx" else "")
    typer.echo(f"next: tritonserver --model-repository={output.resolve()}   then   {check_it}")


def _numbers(text: str | None) -> list[int]:
    """The value of `--gpus`."""
    from gsx_plugins.errors import UsageError

    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            "--gpus is not a list of numbers", expected="numbers of GPUs, e.g. 0,2", found=repr(text)
        ) from error


def _write_plans(bundle: Path, output: Path, name: str, as_json: bool) -> None:
    from gsx import triton_plans
    from gsx_plugins.library import find_library

    models = triton_plans(bundle, output, name=name)
    if as_json:
        print_json({"repository": str(output), "models": [str(model) for model in models]})
        return
    for model in models:
        typer.echo(f"{model}: an engine for Triton's TensorRT backend, with K and V in and out")
    library = find_library() or "/path/to/libgsx_plugins.so"
    typer.echo(f"next: tritonserver --model-repository={output.resolve()} --backend-config=tensorrt,plugins={library}")
