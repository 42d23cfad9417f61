"""A client of a gsx model on Triton, over gRPC: prints tokens as they arrive.

    pip install 'tritonclient[grpc]'
    python examples/triton_client.py "def main(" --max-tokens 32

From a program, with many requests at once (the tests and benchmarks/serving.py do so), requests come as JSON lines on
stdin and answers go to stdout in the same order:

    echo '{"text_input": "def main(", "budget": 0.7}' | python examples/triton_client.py --json --concurrency 4

A request's keys are the model's inputs (docs/triton.md), `outputs`: the outputs wanted besides output_ids and
finish_reason (default: all), and `cancel_after`: cancel after this many tokens.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread, local
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

ALWAYS = ("output_ids", "finish_reason")
TYPES = {"BYTES": np.object_, "INT64": np.int64, "FP64": np.float64, "BOOL": np.bool_}


class Client:
    """One stream to a server; one request at a time.

    Args:
        url: host and gRPC port.
        model: its name.
    """

    def __init__(self, url: str, model: str) -> None:
        self._client = triton.InferenceServerClient(url)
        self._model = model
        inputs = self._client.get_model_metadata(model).inputs
        self._inputs = {one.name: (one.datatype, one.shape) for one in inputs}
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._open()

    def generate(
        self, request: Mapping[str, Any], on_text: Callable[[str], None] = lambda text: None
    ) -> dict[str, Any]:
        """Stream a request.

        Returns: ids, text, the outputs of the last response by name, seconds until the first token and in total, and
            `error`: the server's message, or None.
        """
        given = dict(request)
        cancel_after, wanted = given.pop("cancel_after", None), given.pop("outputs", None)
        began = time.perf_counter()
        answer: dict[str, Any] = {"ids": [], "text": "", "responses": 0, "first_seconds": None, "error": None}
        self._client.async_stream_infer(
            self._model,
            [self._input(name, value) for name, value in {"stream": True, **given}.items()],
            outputs=None if wanted is None else [*map(triton.InferRequestedOutput, {*wanted, *ALWAYS})],
        )
        while True:
            result, error = self._answers.get()
            if error is not None:
                answer["error"] = error.message()
                break
            outputs = {one.name: result.as_numpy(one.name) for one in result.get_response().outputs}
            answer["ids"] += outputs.pop("output_ids").tolist()
            answer["responses"] += 1
            answer["first_seconds"] = answer["first_seconds"] or time.perf_counter() - began
            if "text_output" in outputs:
                text = outputs.pop("text_output")[0].decode()
                answer["text"] += text
                on_text(text)
            if outputs:
                answer |= {
                    name: value[0].item() if value.dtype != object else value[0].decode()
                    for name, value in outputs.items()
                }
                break
            if cancel_after is not None and len(answer["ids"]) >= cancel_after:
                self._client.stop_stream(cancel_requests=True)
                answer["error"] = "cancelled"
                self._answers = queue.Queue()  # what still arrives belongs to the old stream
                self._open()
                break
        answer["seconds"] = time.perf_counter() - began
        return answer

    def _open(self) -> None:
        answers = self._answers
        self._client.start_stream(lambda result, error: answers.put((result, error)))

    def _input(self, name: str, value: Any) -> triton.InferInput:
        kind, _ = self._inputs.get(name, ("BYTES", None))
        if kind == "BYTES":
            parts = value if isinstance(value, list) else [value]
            array = np.array([part.encode() if isinstance(part, str) else part for part in parts], dtype=np.object_)
        else:
            array = np.atleast_1d(np.array(value, TYPES[kind]))
        tensor = triton.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        return tensor


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="Ask a gsx model on Triton.")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument("--url", default="127.0.0.1:8001", help="host and gRPC port")
    parser.add_argument("--model", default="gsx")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--json", action="store_true", help="requests on stdin, answers on stdout, as JSON lines")
    parser.add_argument("--concurrency", type=int, default=1, help="with --json: requests under way at once")
    arguments = parser.parse_args()
    if arguments.json:
        clients = local()

        def ask(line: str) -> dict[str, Any]:
            try:
                if not hasattr(clients, "one"):
                    clients.one = Client(arguments.url, arguments.model)
                answer: dict[str, Any] = clients.one.generate(json.loads(line))
            except InferenceServerException as error:  # no server, or no such model
                answer = {"error": str(error)}
            return answer

        with ThreadPoolExecutor(arguments.concurrency) as pool:
            asked: queue.Queue[Future[dict[str, Any]] | None] = queue.Queue()

            def show() -> None:
                while (one := asked.get()) is not None:
                    print(json.dumps(one.result()), flush=True)

            printing = Thread(target=show)
            printing.start()
            for line in filter(str.strip, sys.stdin):
                asked.put(pool.submit(ask, line))
            asked.put(None)
            printing.join()
        return
    if arguments.prompt is None:
        parser.error("a prompt, or --json")
    request = {"text_input": arguments.prompt, "max_tokens": arguments.max_tokens}
    if arguments.budget is not None:
        request["budget"] = arguments.budget
    try:
        answer = Client(arguments.url, arguments.model).generate(request, lambda text: print(text, end="", flush=True))
    except InferenceServerException as error:  # no server, or no such model
        sys.exit(str(error))
    print()
    if answer["error"]:
        sys.exit(answer["error"])


if __name__ == "__main__":
    main()
