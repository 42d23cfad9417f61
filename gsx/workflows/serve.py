"""`gsx serve`: a bundle behind the OpenAI API, in this process."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from gsx.backend_names import BackendName, Device
from gsx.backends import open_backend
from gsx.defaults import DRAIN_SECONDS, REQUEST_SECONDS, SERVE_HOST, SERVE_PORT
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.chat import ChatTemplate, template_in
from gsx_engines.defaults import SERVED_REQUESTS, WAITING_REQUESTS
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.serving.threads import threads_beside_server
from gsx_engines.speculation.draft import open_draft_runner
from gsx_engines.tokens import TOKENIZER, BundleTokenizer
from gsx_plugins.errors import UsageError

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    bundle: Bundle | str | Path,
    *,
    name: str | None = None,
    host: str = SERVE_HOST,
    port: int = SERVE_PORT,
    api_key: str | None = None,
    slots: int = SERVED_REQUESTS,
    queue: int = WAITING_REQUESTS,
    context: int | None = None,
    seconds: float = REQUEST_SECONDS,
    drain: int = DRAIN_SECONDS,
    threads: int | None = None,
    backend: BackendName = "onnxruntime",
    device: Device | None = None,
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a bundle by the OpenAI API, until Ctrl-C or SIGTERM.

    Args:
        bundle: an opened bundle or its directory.
        name: of the model in requests; None for the directory's name.
        host: the address to listen on.
        port: the port; 0 for any free one.
        api_key: requests must have it; None for none.
        slots: requests processed at once, in steps of one batch.
        queue: requests that may wait; more are refused.
        context: largest number of tokens of a request, prompt and new ones; None for the model's context.
        seconds: how long a request may take.
        drain: seconds that requests under way get at the end.
        threads: number of threads of ONNX Runtime; None for all but one processor, which is left to the server.
        backend: the runtime.
        device: where PyTorch runs; None for a GPU if PyTorch sees one, else the CPU.
        on_start: called with the server's address when it accepts requests.
    Returns: nothing, when the server has ended.
    Raises:
        UsageError: an option or the address cannot be used, or packages are missing.
        LostGpuError: the GPU was lost while serving; start again.
        GsxError: the bundle cannot be used.
    Example:
        >>> gsx.serve("out/demo", port=8000)  # doctest: +SKIP
    """
    missing = [package for package in _NEEDS if find_spec(package) is None]
    if missing:
        raise UsageError(
            "gsx serve needs more packages", found=f"no {', '.join(missing)}", todo="pip install 'gsx[serve]'"
        )
    from gsx_engines.serving import http_server

    for what, number, least in (("slots", slots, 1), ("queue", queue, 1), ("drain", drain, 0), ("threads", threads, 1)):
        if number is not None and number < least:
            raise UsageError(f"{what} is out of range", expected=f"at least {least}", found=str(number))
    if not seconds > 0:
        raise UsageError("the time of a request is out of range", expected="above 0 seconds", found=str(seconds))
    if api_key is not None and (not api_key or not api_key.isascii() or not api_key.isprintable()):
        raise UsageError("the API key cannot be sent", expected="printable ASCII characters")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    manifest = opened.manifest
    most = manifest.decoder.max_positions
    if context is not None and not 2 <= context <= most:
        raise UsageError(
            "context is out of range", expected=f"2 to {most} tokens, the model's context", found=str(context)
        )
    listening = http_server.bind(host, port)
    try:
        tokenizer = BundleTokenizer(opened) if (opened.directory / TOKENIZER).is_file() else None
        template = ChatTemplate(opened, tokenizer) if tokenizer and template_in(opened.directory) else None
        own = manifest.draft.draft if manifest.draft else None
        runtime = open_backend(backend, device, threads)
        runner = open_draft_runner(opened, own, threads or threads_beside_server(), runtime)
        scheduler = Scheduler(runner, tokenizer, slots=slots, queue=queue, context=context)
        scheduler.warm_up()
        served = http_server.Served(
            name=name or opened.directory.resolve().name,
            version=version("gsx"),
            manifest=manifest,
            scheduler=scheduler,
            tokenizer=tokenizer,
            template=template,
            api_key=api_key,
            seconds=seconds,
        )
        chosen, at = listening.getsockname()[:2]
        url = f"http://{f'[{chosen}]' if ':' in chosen else chosen}:{at}"
        http_server.serve(served, listening, drain, lambda: on_start(url))
    finally:
        listening.close()
