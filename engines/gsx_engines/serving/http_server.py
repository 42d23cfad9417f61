"""The OpenAI API over HTTP: a FastAPI application over the scheduler, and the process that serves it.

The event loop only shapes requests and answers; one thread makes all steps of the model (`scheduler.py`). A request is
only data: it cannot name files or code, and one that cannot be carried out is answered with OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.chat import ChatTemplate
from gsx_engines.errors import LostGpuError
from gsx_engines.serving.inbox import Choice, Inbox
from gsx_engines.serving.limits import check_ids_fit, check_text_size, need_tokenizer
from gsx_engines.serving.messages import chat_prompt
from gsx_engines.serving.metrics import Metrics
from gsx_engines.serving.openai_answers import Answer
from gsx_engines.serving.openai_requests import COMPLETION_TOKENS, MAX_CHOICES, ChatBody, CompletionBody
from gsx_engines.serving.request import ClosingError, Finished, NewTokens, OverloadedError
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.tokens import BundleTokenizer, check_text
from gsx_plugins.errors import GsxError, UsageError

_LOG = logging.getLogger(__name__)
# A prompt of a million tokens in JSON; more is refused before it is read.
MAX_BODY_BYTES = 8 * 2**20
RETRY_SECONDS = 1
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Args:
        name: of the model, as requests name it.
        version: of gsx.
        manifest: of the bundle.
        scheduler, tokenizer, template: of the bundle; None without one.
        api_key: requests to the API must have it; None for none.
        seconds: how long a request may take.
    """

    name: str
    version: str
    manifest: Manifest
    scheduler: Scheduler
    tokenizer: BundleTokenizer | None
    template: ChatTemplate | None
    api_key: str | None
    seconds: float
    created: int = field(default_factory=lambda: int(time.time()))


class ApiError(Exception):
    """An answer that is an error, as the OpenAI API has it."""

    def __init__(self, status: int, message: str, code: str | None, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        text = str(self).encode(errors="replace").decode()  # JSON in UTF-8 has no lone surrogates
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers = {429: {"Retry-After": str(RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(self.body, self.status, headers.get(self.status))


def api_error(error: Exception) -> ApiError:
    """What a client is told about an error. One that is not the request's own fault is logged, and sent without
    internal details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, error.message, None)
    if isinstance(error, ClosingError):
        return ApiError(503, error.message, "shutting_down")
    if isinstance(error, LostGpuError):
        return ApiError(503, error.message, "gpu_lost")
    if isinstance(error, OverloadedError):
        return ApiError(429, error.message, "queue_full")
    if isinstance(error, GsxError):
        return ApiError(500, error.message, None)
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"an error inside the server ({type(error).__name__})", None)


def make_app(served: Served) -> FastAPI:
    """The application: the OpenAI API, health, metrics, and a page to try it."""
    metrics = Metrics(served.scheduler)
    api = _Api(served, metrics)
    app = FastAPI(title="gsx", version=served.version, docs_url=None, redoc_url=None)
    app.add_middleware(_Door, api_key=served.api_key)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        metrics.count("refused")
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return ApiError(400, f"{place or 'the body'}: {first['msg']}", "invalid_value", param=place).response

    @app.exception_handler(HTTPException)
    async def not_here(_: HttpRequest, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), None).response

    @app.exception_handler(ApiError)
    @app.exception_handler(GsxError)
    async def refused(_: HttpRequest, error: Exception) -> Response:
        metrics.count("refused")
        return api_error(error).response

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> Response:
        return api_error(error).response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [api.model]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model of this name."""
        api.check_model(name)
        return api.model

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: HttpRequest) -> Response:
        """Continue one text, or several."""
        return await api.answer(body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: HttpRequest) -> Response:
        """Answer in a chat."""
        return await api.answer(body, request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> Response:
        """Whether requests are accepted."""
        if served.scheduler.failure is not None:
            return JSONResponse({"status": "the GPU is lost"}, 503)
        if served.scheduler.closed or not api.is_working():
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of gsx."""
        return {"version": served.version}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app


class _Api:
    """Carries out completions and chats."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self._served, self._metrics = served, metrics
        manifest = served.manifest
        inputs = [one.name for one in manifest.policy.inputs] if manifest.policy else []
        self.model = {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "gsx",
            "max_model_len": served.scheduler.context,
            "gsx": {
                "policy": manifest.policy.name if manifest.policy else None,
                "inputs": inputs,
                "budget": manifest.selection.budget if manifest.selection else None,
                "least_budget": min(p.budget for p in manifest.selection.grid) if manifest.selection else None,
                "layers": manifest.decoder.num_layers,
                "branches": [list(place) for place in manifest.skippable_places],
                "draft": str(manifest.draft.draft) if manifest.draft else None,
                "chat": served.template is not None,
            },
        }

    def is_working(self) -> bool:
        """Whether the scheduler's thread lives."""
        return any(thread.name == _SCHEDULER for thread in threading.enumerate())

    def check_model(self, name: str) -> None:
        """Refuse another model's name."""
        if name != self._served.name:
            found = f"the model {name[:200]!r} is not here\n  expected {self._served.name}"
            raise ApiError(404, found, "model_not_found", param="model")

    def completion(self, body: CompletionBody) -> Answer:
        """The requests of a completion."""
        tokenizer, context = self._tokenizer(), self._served.scheduler.context
        prompts = body.prompts
        if len(prompts) * (body.n or 1) > MAX_CHOICES:
            raise UsageError(
                "there are too many choices",
                expected=f"at most {MAX_CHOICES}, over all prompts",
                found=str(len(prompts) * (body.n or 1)),
            )
        requests, echo = [], []
        for prompt in prompts:
            if isinstance(prompt, str):
                check_text(prompt)
                check_text_size("the prompt", len(prompt.encode()), context)
                ids = tokenizer.encode_prompt(prompt)
            else:
                check_ids_fit(len(prompt), context)
                ids = prompt
            if body.echo:
                echo.append(prompt if isinstance(prompt, str) else tokenizer.decode(ids))
            scored = bool(body.echo) and body.logprobs is not None
            if scored and body.stream:
                raise UsageError("a stream has no log-probabilities of its prompt", found="echo, logprobs and stream")
            requests.append(
                body.request(ids, COMPLETION_TOKENS, logprobs=body.logprobs, stop_ids=None, prompt_logprobs=scored)
            )
        return Answer("completion", self._served.name, requests, body.n or 1, echo, tokenizer, self._served.manifest)

    def chat(self, body: ChatBody) -> Answer:
        """The request of a chat."""
        tokenizer, template = self._tokenizer(), self._served.template
        context = self._served.scheduler.context
        prompt = chat_prompt(template, body.messages, context, "POST /v1/completions")
        stop_ids = template.stop_ids if template else None
        request = body.request(prompt, context - len(prompt), logprobs=body.likeliest, stop_ids=stop_ids)
        return Answer("chat", self._served.name, [request], body.n or 1, [], tokenizer, self._served.manifest)

    async def answer(self, body: CompletionBody | ChatBody, request: HttpRequest) -> Response:
        """Carry out a request."""
        self.check_model(body.model)
        # In a thread of its own, since a long text takes its time.
        if isinstance(body, ChatBody):
            answer = await run_in_threadpool(self.chat, body)
        else:
            answer = await run_in_threadpool(self.completion, body)
        inbox = Inbox(self._metrics)
        inbox.put_after(
            self._served.seconds, ApiError(504, "the request took longer than this server allows", "timeout")
        )
        try:
            for number, one in enumerate(answer.requests):
                first = number * answer.choices
                self._served.scheduler.submit(one, *(Choice(inbox, first + n) for n in range(answer.choices)))
        except BaseException:
            inbox.leave()  # the requests that were accepted before
            raise
        count = len(answer.requests) * answer.choices
        if body.stream:
            events = _stream(answer, inbox, count, body.includes_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await _whole(answer, inbox, count, request)

    def _tokenizer(self) -> BundleTokenizer:
        return need_tokenizer(self._served.tokenizer, "a bundle with tokenizer.json", "none")


async def _whole(answer: Answer, inbox: Inbox, count: int, request: HttpRequest) -> Response:
    """The answer in one piece; a client that goes away ends its continuations."""
    news: list[list[NewTokens]] = [[] for _ in range(count)]
    results: dict[int, Finished] = {}
    leaving = asyncio.ensure_future(_left(request.receive, inbox))
    try:
        while len(results) < count:
            index, event = await inbox.get()
            if isinstance(event, Finished):
                results[index] = event
            elif isinstance(event, NewTokens):
                news[index].append(event)
            else:
                return api_error(event).response
    finally:
        inbox.leave()
        leaving.cancel()
    return JSONResponse(answer.whole(news, [results[index] for index in range(count)]))


async def _left(receive: Receive, inbox: Inbox) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.put(0, ApiError(499, "the client went away", None))


async def _stream(answer: Answer, inbox: Inbox, count: int, usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    results: dict[int, Finished] = {}
    try:
        for chunk in answer.first_chunks():
            yield _event(chunk)
        while len(results) < count:
            index, event = await inbox.get()
            if isinstance(event, NewTokens):
                # A token whose text is not complete yet is reported only if something else is known of it.
                if event.text or event.logprobs or event.kept:
                    yield _event(answer.chunk(index, event))
            elif isinstance(event, Finished):
                results[index] = event
                last = answer.last_chunk(index, event)
                if len(results) == count and not usage:
                    last |= answer.figures([results[n] for n in range(count)])
                yield _event(last)
            else:
                yield _event(api_error(event).body)
                return
        if usage:
            yield _event(answer.usage_chunk([results[n] for n in range(count)]))
        yield "data: [DONE]\n\n"
    finally:
        inbox.leave()


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Door:
    """Refuses what is not let in: requests to the API without its key, and bodies that are too large."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"].startswith("/v1/") and not self._has_key(headers):
            error = ApiError(
                401, "the API key is missing or wrong\n  expected Authorization: Bearer KEY", "invalid_api_key"
            )
            await error.response(scope, receive, send)
            return
        too_large = ApiError(413, f"the body is too large\n  expected at most {MAX_BODY_BYTES} bytes", "too_large")
        size = headers.get(b"content-length", b"0")
        if not size.isdigit() or int(size) > MAX_BODY_BYTES:
            await too_large.response(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:  # without a length, in chunks
                raise HTTPException(413, str(too_large))  # which FastAPI does not take for a body that it cannot parse
            return message

        await self._app(scope, limited, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        assert self._key is not None
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key.encode())


_SCHEDULER = "scheduler"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 for any free one.

    Raises:
        UsageError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise UsageError(
            f"{host}:{port} cannot be used",
            expected="an address of this machine, and a free port",
            found="the port is in use" if used else str(error),
            todo="gsx serve --port takes another one; 0 is any free one",
        ) from error


def serve(served: Served, listening: socket.socket, drain_seconds: int, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; then requests that are under way get `drain_seconds` to end.

    Args:
        listening: of `bind`.
        on_start: called when requests are accepted.
    Raises:
        LostGpuError: the GPU was lost; the clients were told, and only a new process can serve.
    """
    scheduler = served.scheduler
    config = uvicorn.Config(
        make_app(served),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=drain_seconds,
    )
    server = _Server(config, on_start)

    def work() -> None:
        scheduler.run()
        server.should_exit = True  # if it ended by itself

    worker = threading.Thread(target=work, name=_SCHEDULER, daemon=True)
    worker.start()
    try:
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after its clean end
            server.run(sockets=[listening])
    finally:
        scheduler.close()
        worker.join()
        listening.close()
    if scheduler.failure is not None:
        raise scheduler.failure


class _Server(uvicorn.Server):
    """Says when it has started."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self._on_start()
