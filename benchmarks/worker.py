"""A runtime that gsx is compared with, in a process of its own: ONNX Runtime GenAI or llama.cpp.

It answers as `gsx.benchmarking.worker` does for a bundle, and gives logits too. A runtime may be installed in another
environment (`llama.py`), so of this project only the other end of the pipe is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gsx.benchmarking.machine import peak_mb
from gsx.benchmarking.process import serve

WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Runtime:
    """A loaded runtime.

    Args:
        continued: prompt ids, number of new tokens -> seconds to the first token, seconds for the rest, tokens.
        logits: ids [S] -> logits [S, V].
    """

    continued: Callable[[list[int], int], tuple[float, float, list[int]]]
    logits: Callable[[list[int]], np.ndarray]


def genai(spec: dict[str, Any]) -> Runtime:
    """ONNX Runtime GenAI on a model that its own builder made; logits by ONNX Runtime on the same file."""
    import onnxruntime as ort
    import onnxruntime_genai as og

    path, threads = Path(spec["path"]), spec["threads"]
    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def continued(prompt: list[int], new_tokens: int) -> tuple[float, float, list[int]]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
        started = time.perf_counter()
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        tokens = [int(generator.get_next_tokens()[0])]
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return first - started, time.perf_counter() - first, tokens

    shape = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]

    @cache
    def session() -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        return ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])

    def logits(ids: list[int]) -> np.ndarray:
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        for value in session().get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((1, shape["num_key_value_heads"], 0, shape["head_size"]), np.float32)
        found: np.ndarray = session().run(["logits"], feeds)[0][0]
        return found

    return Runtime(continued, logits)


def llama(spec: dict[str, Any]) -> Runtime:
    """llama.cpp on a GGUF file, with its flash attention and 16-bit K and V, or all in float32 (`exact`)."""
    import llama_cpp

    threads, context, exact = spec["threads"], spec["context"], spec["exact"]
    options: dict[str, Any] = {"n_ctx": context, "n_batch": context, "n_ubatch": context, "logits_all": spec["logits"]}
    options |= {"n_threads": threads, "n_threads_batch": threads, "flash_attn": not exact, "verbose": False}
    if exact:
        options |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(spec["path"]), **options)

    def after(tokens: list[int]) -> int:
        model.eval(tokens)
        found = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(found, (model.n_vocab(),)).argmax())

    def continued(prompt: list[int], new_tokens: int) -> tuple[float, float, list[int]]:
        model.reset()
        started = time.perf_counter()
        tokens = [after(prompt)]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens.append(after(tokens[-1:]))
        return first - started, time.perf_counter() - first, tokens

    def logits(ids: list[int]) -> np.ndarray:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)], np.float32)

    return Runtime(continued, logits)


KINDS = {"genai": genai, "llama": llama}


def load(spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load a runtime. Args: spec: its `kind`, the `path` of its model, `threads`, and what its function reads."""
    runtime = KINDS[spec["kind"]](spec)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "ids" in request:
            np.save(request["file"], runtime.logits(request["ids"]))
            return {}
        (prompt,), new_tokens = request["prompts"], request["new_tokens"]
        runtime.continued(prompt, WARM_UP_TOKENS)
        first, rest, tokens = runtime.continued(prompt, new_tokens)
        return {"first": first, "token": rest / (new_tokens - 1), "tokens": [tokens], "peak_mb": peak_mb()}

    return answer


if __name__ == "__main__":
    serve(lambda: load(json.loads(sys.argv[1])))
