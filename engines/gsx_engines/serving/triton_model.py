"""The model that Triton's Python backend loads: it passes requests to the scheduler, and sends the responses.

Triton starts a process for it (the stub), imports `1/model.py` of the repository, which imports this module, and calls
`execute` with requests as they come. Responses are sent from a separate thread, since sending waits for the server and
the next step should not. Tokens that arrive in the meantime go into the request's next response.

A request is only data: it cannot name files or code, and one that cannot be carried out is answered with its own error.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.chat import ChatTemplate, template_in
from gsx_engines.errors import LostGpuError
from gsx_engines.sampling import Sampling
from gsx_engines.serving.device import show_own_device
from gsx_engines.serving.fields import FORMS, Field, Form
from gsx_engines.serving.limits import check_ids_fit, check_layers, check_stops, check_text_size, need_tokenizer
from gsx_engines.serving.messages import chat_prompt, messages_of
from gsx_engines.serving.request import Finished, NewTokens, OverloadedError, Request
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.serving.threads import threads_beside_server
from gsx_engines.speculation.draft import open_draft_runner
from gsx_engines.tokens import TOKENIZER, BundleTokenizer
from gsx_plugins.errors import GsxError, UsageError

_LOG = logging.getLogger(__name__)

# How often Triton is asked whether a request was cancelled, and how often gauges are updated: each takes a round trip
# between the processes, as long as a step of a small model.
CANCEL_SECONDS = GAUGE_SECONDS = 0.05
# Status of a process whose GPU is lost, and how long its last answers may take.
LOST_GPU, FAREWELL_SECONDS = 1, 10.0

_TYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_BOOL": np.bool_,
}

_COUNTERS = {
    "finished": "requests that ended normally",
    "failed": "requests that ended with an error",
    "cancelled": "requests whose client went away",
    "refused": "requests that were not accepted",
    "prompt_tokens": "tokens of prompts of finished requests",
    "cached_tokens": "those of them whose K and V were there already",
    "new_tokens": "new tokens of finished requests",
    "kept_rows": "(token, branch) pairs that were kept",
    "gated_rows": "(token, branch) pairs that the keep rule decided on",
    "drafted_tokens": "drafted tokens",
    "accepted_tokens": "drafted tokens that were correct",
    "waited_microseconds": "time from arrival to prefill",
    "first_token_microseconds": "time from arrival to first token",
    "decode_microseconds": "time from first token to last",
}


class TritonPythonModel:
    """See the Python backend's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside `model.py`, and start the scheduler's thread."""
        show_own_device(args, os.environ)
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        try:
            self._open(args, parameters)
        except GsxError as error:
            raise pb_utils.TritonModelException(error.message) from error
        self._metrics = _Metrics(config["name"], self._scheduler)
        self._outbox = _Outbox()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        """Make all steps. Without its GPU this process ends: Triton keeps calling a model for as long as it lives."""
        self._scheduler.run(self._metrics.update)
        if self._scheduler.failure is not None:
            self._outbox.close(FAREWELL_SECONDS)
            _LOG.critical("the model's process ends: %s", self._scheduler.failure.message)
            os._exit(LOST_GPU)

    def _open(self, args: dict[str, str], parameters: dict[str, str]) -> None:
        self._form = FORMS[parameters["form"]]
        bundle = open_bundle(Path(args["model_repository"]) / args["model_version"] / "bundle")
        own = bundle.manifest.draft.draft if bundle.manifest.draft else None
        threads = int(parameters["threads"]) if "threads" in parameters else threads_beside_server()
        runner = open_draft_runner(bundle, own, threads, parameters["backend"])  # type: ignore[arg-type]
        self._tokenizer = BundleTokenizer(bundle) if (bundle.directory / TOKENIZER).is_file() else None
        chats = self._tokenizer is not None and template_in(bundle.directory) is not None
        self._template = ChatTemplate(bundle, self._tokenizer) if self._tokenizer and chats else None
        self._not_there = frozenset() if self._tokenizer is not None else frozenset({"text_output"})
        self._scheduler = Scheduler(
            runner,
            self._tokenizer,
            slots=int(parameters["slots"]),
            queue=int(parameters["queue"]),
            context=int(parameters["context"]) if "context" in parameters else None,
        )
        self._scheduler.warm_up()

    def execute(self, requests: Sequence[Any]) -> None:
        """Pass requests to the scheduler; those that cannot be carried out are answered at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                _check_parameters(request, self._form)
                given = _given(request, self._form)
                wanted = frozenset(request.requested_output_names()) - self._not_there
                for number in ("num_input_tokens", "num_output_tokens"):
                    if not given.get(f"return_{number}"):
                        wanted -= {number}
                asked = self._request(given)
                text = given["text_input"]
                echo = text.decode() if text is not None and given.get("exclude_input_in_output") is False else ""
                sends = _Responses(sender, self._form, wanted, len(asked.prompt), echo)
                self._scheduler.submit(asked, _Client(sends, self._outbox, bool(given["stream"]), self._metrics))
            except GsxError as error:
                self._metrics.count("refused")
                _fail(sender, error)

    def finalize(self) -> None:
        """End the thread; unfinished requests fail."""
        self._scheduler.close()
        self._thread.join()
        self._outbox.close()

    def _request(self, given: dict[str, Any]) -> Request:
        prompts = [name for name in _PROMPTS if given[name] is not None]
        if len(prompts) != 1:
            raise UsageError(
                "the prompt must be given exactly once",
                expected="text_input, input_ids or messages",
                found=" and ".join(prompts) or "none of them",
            )
        stops = given["stop"] if given.get("stop_words") is None else given["stop_words"]
        stop = tuple(_text(part, "stop") for part in stops) if stops is not None else ()
        check_stops(stop)
        layers = given["layers"]
        check_layers(len(layers or b""))
        keep = {field.name: given[field.name] for field in fields(KeepSettings)}
        keep["hold"] = bool(given["hold"])
        if layers is not None:
            keep["layers"] = _text(layers, "layers")
        return Request(
            prompt=self._prompt(prompts[0], given[prompts[0]]),
            max_new_tokens=128 if given["max_tokens"] is None else given["max_tokens"],
            keep=KeepSettings(**keep),
            sampling=Sampling(**{name: given[name] for name in _SAMPLING if given[name] is not None}),
            stop=stop,
            stop_ids=self._template.stop_ids if self._template and prompts == ["messages"] else None,
            speculative=bool(given["speculative"]),
        )

    def _prompt(self, name: str, value: Any) -> list[int]:
        context = self._scheduler.context
        if name == "input_ids":
            check_ids_fit(len(value), context)
            return list(map(int, value))
        tokenizer = need_tokenizer(self._tokenizer, "input_ids", name)
        check_text_size(name, len(value), context)
        text = _text(value, name)
        if name == "messages":
            return chat_prompt(self._template, messages_of(text), context, "text_input or input_ids")
        return tokenizer.encode_prompt(text)


_PROMPTS = ("text_input", "input_ids", "messages")
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)


class _Outbox:
    """Sends responses in order, in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, send: Callable[[], None]) -> None:
        """Queue a response to be sent."""
        self._waiting.put(send)

    def close(self, seconds: float | None = None) -> None:
        """Send all queued responses, and end the thread. Args: seconds: how long that may take."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (send := self._waiting.get()) is not None:
            try:
                send()
            except Exception:
                _LOG.warning("a response could not be sent", exc_info=True)


class _Responses:
    """The responses of a request, with only the outputs that it wants: tensors are most of a response's cost.

    Args:
        sender: of Triton.
        form: of the responses.
        wanted: names of outputs.
        prompt_tokens: of the request.
        echo: comes before the first text.
    """

    def __init__(self, sender: Any, form: Form, wanted: frozenset[str], prompt_tokens: int, echo: str) -> None:
        self.sender = sender
        self._fields = {field.name: field for field in form.outputs if field.name in wanted}
        self._batch, self._prompt_tokens, self._echo = form.batch, prompt_tokens, echo

    def send(self, ids: list[int], text: str, more: Sequence[tuple[str, list[Any]]], *, last: bool) -> None:
        """Send a response with new tokens, their text, and further values."""
        text, self._echo = self._echo + text, ""
        counts = [("num_input_tokens", [self._prompt_tokens]), ("num_output_tokens", [len(ids)])]
        given: list[tuple[str, list[Any]]] = [("text_output", [text]), ("output_ids", ids), *counts, *more]
        tensors = []
        for name, values in given:
            if name in self._fields:
                array = np.array(values, dtype=_TYPES[self._fields[name].data_type])
                tensors.append(pb_utils.Tensor(name, array[None] if self._batch else array))
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        self.sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


class _Client:
    """Collects what a request gets until it can be sent."""

    def __init__(self, responses: _Responses, outbox: _Outbox, streams: bool, metrics: _Metrics) -> None:
        self._responses, self._outbox, self._metrics = responses, outbox, metrics
        self._streams = streams
        self._lock = threading.Lock()  # guards tokens and text that have not been sent
        self._ids: list[int] = []
        self._text = ""
        self._is_waiting = False  # whether a response is in the outbox
        self._asks_at = 0.0

    def tokens(self, new: NewTokens) -> None:
        """See `Client`."""
        with self._lock:
            self._ids += new.ids
            self._text += new.text
            if not self._streams or self._is_waiting:
                return
            self._is_waiting = True
        self._outbox.put(partial(self._send, []))

    def finished(self, result: Finished) -> None:
        """See `Client`."""
        stats = result.stats
        values = {
            "finish_reason": result.finish,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": result.cached_tokens,
            "new_tokens": stats.new_tokens,
            "decode_steps": stats.decode_steps,
            "waited_seconds": result.waited_seconds,
            "first_token_seconds": result.first_token_seconds,
            "decode_seconds": stats.decode_seconds,
            "kept_share": stats.kept_share,
            "held_share": stats.held_share,
            "acceptance": stats.acceptance,
        }
        outputs = [(name, [value]) for name, value in values.items() if value is not None]
        self._outbox.put(partial(self._send, outputs, last=True))
        self._outbox.put(partial(self._metrics.count_finished, result))

    def failed(self, error: Exception) -> None:
        """See `Client`."""
        self._outbox.put(partial(_fail, self._responses.sender, error))
        self._outbox.put(partial(self._metrics.count, "failed"))

    def is_gone(self) -> bool:
        """See `Client`."""
        now = time.perf_counter()
        if now < self._asks_at:
            return False
        self._asks_at = now + CANCEL_SECONDS
        return bool(self._responses.sender.is_cancelled())

    def dropped(self) -> None:
        """See `Client`."""
        end = partial(self._responses.sender.send, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self._outbox.put(end)
        self._outbox.put(partial(self._metrics.count, "cancelled"))

    def _send(self, outputs: Sequence[tuple[str, list[Any]]], *, last: bool = False) -> None:
        """Send what has arrived since the last response: the tokens of one step, or of several if sending is slow."""
        with self._lock:
            ids, text = self._ids, self._text
            self._ids, self._text, self._is_waiting = [], "", False
        self._responses.send(ids, text, outputs, last=last)


class _Metrics:
    """The server's own counters, on Triton's metrics port."""

    def __init__(self, model: str, scheduler: Scheduler) -> None:
        family, labels = pb_utils.MetricFamily, {"model": model}
        # Kept as members, since metric families are removed with their objects.
        self._families = {
            name: family(name=f"gsx_{name}", description=about, kind=family.COUNTER)
            for name, about in _COUNTERS.items()
        }
        self._gauges = {
            "under_way": family(name="gsx_under_way", description="requests that are running", kind=family.GAUGE),
            "waiting": family(name="gsx_waiting", description="requests in the queue", kind=family.GAUGE),
        }
        metrics = {**self._families, **self._gauges}
        self._metrics = {name: one.Metric(labels=labels) for name, one in metrics.items()}
        self._scheduler = scheduler
        self._reported: dict[str, int] = {}
        self._next_report = 0.0

    def count(self, name: str, number: float = 1) -> None:
        """Add to a counter."""
        if number:
            self._metrics[name].increment(number)

    def count_finished(self, result: Finished) -> None:
        """Add a request's counters."""
        stats = result.stats
        for name, number in {
            "finished": 1,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": result.cached_tokens,
            "new_tokens": stats.new_tokens,
            "kept_rows": stats.kept_rows,
            "gated_rows": stats.gated_rows,
            "drafted_tokens": sum(stats.drafted),
            "accepted_tokens": sum(stats.accepted),
            "waited_microseconds": result.waited_seconds * 1e6,
            "first_token_microseconds": result.first_token_seconds * 1e6,
            "decode_microseconds": stats.decode_seconds * 1e6,
        }.items():
            self.count(name, number)

    def update(self) -> None:
        """Set the gauges."""
        now = time.perf_counter()
        values = {"under_way": self._scheduler.under_way, "waiting": self._scheduler.waiting}
        if values == self._reported or (any(values.values()) and now < self._next_report):
            return
        for name, value in values.items():
            self._metrics[name].set(value)
        self._reported, self._next_report = values, now + GAUGE_SECONDS


def _check_parameters(request: Any, form: Form) -> None:
    """Refuse unknown parameters: Triton's HTTP front end passes a misspelt input on as a parameter."""
    unknown = [name for name in json.loads(request.parameters() or "{}") if not name.startswith("triton_")]
    if unknown:
        raise UsageError(
            "unknown fields", expected=", ".join(field.name for field in form.inputs), found=", ".join(sorted(unknown))
        )


def _given(request: Any, form: Form) -> dict[str, Any]:
    """The values of a request by input: None, one value, or an array [n]."""
    tensors = {tensor.name(): tensor for tensor in request.inputs()}
    return {
        field.name: _value(tensors[field.name], field, form) if field.name in tensors else None for field in form.inputs
    }


def _value(tensor: Any, field: Field, form: Form) -> Any:
    array = tensor.as_numpy()
    if form.batch and array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or (not field.many and len(array) != 1) or array.dtype != _TYPES[field.data_type]:
        raise UsageError(
            f"{field.name} has a wrong type or shape",
            expected=f"{field.data_type} {'[n]' if field.many else '[1]'}",
            found=f"{array.dtype} {list(array.shape)}",
        )
    return array if field.many else array[0] if field.data_type == "TYPE_STRING" else array[0].item()


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UsageError(f"{name} is not UTF-8 text", found=f"byte 0x{byte:02x} at {error.start}") from error


def _fail(sender: Any, error: Exception) -> None:
    """Answer a request with an error, which ends it."""
    if isinstance(error, (OverloadedError, LostGpuError)):
        code = pb_utils.TritonError.UNAVAILABLE
    elif isinstance(error, UsageError):
        code = pb_utils.TritonError.INVALID_ARG
    else:
        code = pb_utils.TritonError.INTERNAL
    # An error that is not the request's own fault is logged in full, but sent without internal details.
    text = error.message if isinstance(error, GsxError) else f"an error inside the server ({type(error).__name__})"
    response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text, code))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
