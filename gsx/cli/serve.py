"""`gsx serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from gsx.cli.console import remark
from gsx.cli.options import BackendOptions, BundleArgument, grouped
from gsx.cli.signals import loading
from gsx.defaults import DRAIN_SECONDS, REQUEST_SECONDS, SERVE_HOST, SERVE_PORT
from gsx_engines.defaults import SERVED_REQUESTS, WAITING_REQUESTS


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(serve))


def serve(
    bundle: BundleArgument,
    backend: BackendOptions,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests.", show_default="the bundle's directory")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = SERVE_HOST,
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.")] = SERVE_PORT,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that requests must have.", envvar="GSX_API_KEY", show_envvar=True, show_default="none"),
    ] = None,
    slots: Annotated[int, typer.Option(help="Requests processed at once, in steps of one batch.")] = SERVED_REQUESTS,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused.")] = WAITING_REQUESTS,
    context: Annotated[
        int | None,
        typer.Option(help="Largest number of tokens of a request, prompt and new ones.", show_default="the model's"),
    ] = None,
    seconds: Annotated[float, typer.Option("--request-seconds", help="How long a request may take.")] = REQUEST_SECONDS,
    drain: Annotated[
        int, typer.Option("--drain-seconds", help="How long requests under way may take at the end.")
    ] = DRAIN_SECONDS,
    threads: Annotated[
        int | None, typer.Option(help="Threads of ONNX Runtime.", show_default="all but one processor, for the server")
    ] = None,
) -> None:
    """Serve a bundle by the OpenAI API. SIGTERM or Ctrl-C ends it once the requests under way are answered.

    Example: gsx serve out/demo --port 8000
    """
    with loading():
        from gsx import serve as serve_bundle

    serve_bundle(
        bundle,
        name=name,
        host=host,
        port=port,
        api_key=api_key,
        slots=slots,
        queue=queue,
        context=context,
        seconds=seconds,
        drain=drain,
        threads=threads,
        on_start=lambda url: remark(f"{bundle}: {url}/v1, a page to try it at {url}/"),
        **vars(backend),
    )
