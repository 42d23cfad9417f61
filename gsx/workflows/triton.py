"""`gsx triton`: a bundle as a model repository of Triton Inference Server, and the check of a server that runs it.

The check asks the server for tokens and compares them with the bundle's own. A server may report that it is ready and
still answer wrongly: with NumPy 2 in the environment of an older Triton, tensors arrive empty or changed, without an
error.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gsx.workflows.generate import generate
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.defaults import SERVED_REQUESTS, WAITING_REQUESTS
from gsx_engines.serving.plan_repository import write_plan_repository
from gsx_engines.serving.repository import Backend, write_repository
from gsx_plugins.errors import GsxError, UsageError

CHECK_TOKENS = 16


def triton(
    bundle: Bundle | str | Path,
    out: str | Path,
    *,
    name: str = "gsx",
    backend: Backend = "onnxruntime",
    slots: int = SERVED_REQUESTS,
    queue: int = WAITING_REQUESTS,
    context: int | None = None,
    threads: int | None = None,
    openai: bool = False,
    gpus: Sequence[int] = (),
) -> Path:
    """Write a model repository for Triton Inference Server, with one model for the server's Python backend.

    Args:
        bundle: the bundle to serve.
        out: the repository; it must not be there, or be an empty directory.
        name: of the model.
        backend: the runtime; the TensorRT ones need engines in the bundle (`gsx.build`).
        slots: requests processed at once, in steps of one batch.
        queue: requests that may wait; more are refused.
        context: largest number of tokens of a request, prompt and new ones; None for the model's context.
        threads: number of threads of ONNX Runtime; None for all but one processor, which is left to the server.
        openai: take requests as Triton's OpenAI front end sends them, whose types differ.
        gpus: numbers of the GPUs that get an instance of their own, with TensorRT; empty for all that Triton sees.
    Returns: the model's directory.
    Raises:
        UsageError: `out` is not empty, or a number or name cannot be used.
        EngineError: the bundle has no engines for the backend.
    Example:
        >>> gsx.triton("out/demo", "out/repository").as_posix()
        'out/repository/gsx'
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return write_repository(
        opened,
        Path(out),
        name=name,
        backend=backend,
        slots=slots,
        queue=queue,
        context=context,
        threads=threads,
        form="openai" if openai else "gsx",
        gpus=gpus,
    )


def triton_plans(bundle: Bundle | str | Path, out: str | Path, *, name: str = "gsx") -> list[Path]:
    """Write a bundle's engines as models for Triton's own TensorRT backend, for programs that keep K and V themselves.

    Args:
        bundle: has TensorRT engines with a growing K/V layout.
        out: the repository; it must not be there, or be an empty directory.
        name: the model's name; the further models of a bundle with a draft are named after it.
    Returns: the models' directories.
    Raises:
        UsageError: `out` is not empty, or the name cannot be used.
        EngineError: the bundle has no such engines, or their files are not the ones that were built.
    Example, on a machine with a GPU and TensorRT:
        >>> gsx.build("out/demo", backend="tensorrt", kv_layout="growing")  # doctest: +SKIP
        >>> gsx.triton_plans("out/demo", "out/repository")  # doctest: +SKIP
        [PosixPath('out/repository/gsx')]
    """
    return write_plan_repository(bundle if isinstance(bundle, Bundle) else open_bundle(bundle), Path(out), name=name)


def check_server(bundle: Bundle | str | Path, url: str, *, name: str = "gsx", timeout_seconds: float = 60.0) -> int:
    """Compare a server's tokens with the bundle's own.

    Args:
        bundle: the bundle that the server runs.
        url: the server's HTTP address, e.g. http://localhost:8000.
        name: of the model.
        timeout_seconds: how long to wait for the answer.
    Returns: how many tokens were compared.
    Raises:
        GsxError: the server does not answer, or answers with an error or other tokens.
    Example, while `tritonserver --model-repository=out/repository` runs:
        >>> gsx.check_server("out/demo", "http://localhost:8000")  # doctest: +SKIP
        16
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError("the server's address", expected="e.g. http://localhost:8000", found=repr(url))
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    shape = opened.manifest.decoder
    count = min(CHECK_TOKENS, shape.max_positions // 2)
    prompt = [number * 7 % shape.vocab_size for number in range(1, count + 1)]
    expected = generate(opened, ids=prompt, max_new_tokens=count, speculative=False).ids
    answer = _ask(
        f"{url.rstrip('/')}/v2/models/{name}/generate", {"input_ids": prompt, "max_tokens": count}, timeout_seconds
    )
    found = answer.get("output_ids")
    found = [found] if isinstance(found, int) else found  # Triton writes a list with one element as the element
    if found != expected:
        raise GsxError(
            f"{url}: the server does not answer as the bundle does",
            expected=f"tokens {expected}",
            found=str(answer.get("error", found)),
            todo="if the server's Python has NumPy 2: pip install 'numpy<2' there; else compare the bundles",
        )
    return len(expected)


def _ask(url: str, body: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        reason = error.read(2000).decode(errors="replace")
        raise GsxError(f"{url}: the server refused", found=f"{error.code}, {reason}") from error
    except (OSError, ValueError) as error:
        raise GsxError(
            f"{url}: no answer from the server", found=str(error), todo="check that it is running and ready"
        ) from error
    return found if isinstance(found, dict) else {"error": found}
