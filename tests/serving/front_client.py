"""Sends what Triton's OpenAI front end sends to a model that is not vLLM's; runs in the server's own environment.

Requests come as a JSON list on stdin, answers go to stdout, one per line.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

TYPES = {np.dtype(np.object_): "BYTES", np.dtype(np.bool_): "BOOL", np.dtype(np.int32): "INT32"}
TYPES |= {np.dtype(np.float32): "FP32", np.dtype(np.uint64): "UINT64"}


def inputs_of(request: dict[str, Any]) -> list[InferInput]:
    """The inputs with the types and shapes of the front end's `_create_trtllm_inference_request`."""
    values: dict[str, np.ndarray] = {
        "text_input": np.array([[request["prompt"].encode()]], np.object_),
        "stream": np.array([[request["stream"]]], np.bool_),
        "max_tokens": np.array([[request["max_tokens"]]], np.int32),
        "exclude_input_in_output": np.array([[not request.get("echo", False)]], np.bool_),
        "return_num_input_tokens": np.array([[True]], np.bool_),
        "return_num_output_tokens": np.array([[True]], np.bool_),
    }
    if "stop" in request:
        values["stop_words"] = np.array([[word.encode() for word in request["stop"]]], np.object_)
    for name in ("top_p", "frequency_penalty", "presence_penalty", "temperature"):
        if name in request:
            values[name] = np.array([[request[name]]], np.float32)
    if "seed" in request:
        values["seed"] = np.array([[request["seed"]]], np.uint64)
    made = []
    for name, value in values.items():
        tensor = InferInput(name, list(value.shape), TYPES[value.dtype])
        tensor.set_data_from_numpy(value)
        made.append(tensor)
    return made


def main() -> None:
    """Send the requests one after the other."""
    with InferenceServerClient(sys.argv[1]) as client:
        for request in json.load(sys.stdin):
            answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
            client.start_stream(lambda result, error, to=answers: to.put((result, error)))
            client.async_stream_infer("front", inputs_of(request), enable_empty_final_response=True)
            found: dict[str, Any] = {"texts": [], "input_tokens": [], "output_tokens": [], "error": None}
            while True:
                result, error = answers.get(timeout=60)
                if error is not None:
                    found["error"] = str(error)
                    break
                text = result.as_numpy("text_output")
                if text is not None:
                    assert text.size == 1, "the front end reads exactly one string"
                    found["texts"].append(text.item().decode())
                    found["input_tokens"].append(int(result.as_numpy("num_input_tokens").item()))
                    found["output_tokens"].append(int(result.as_numpy("num_output_tokens").item()))
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
            client.stop_stream()
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
