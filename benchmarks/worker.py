"""One peer in a process of its own: reads commands on standard input, answers in JSON lines.

One process for each peer keeps thread pools and memory apart, so that peers can be timed in turn without disturbing
each other. A peer may be installed in another environment (`llama.py`), so the project is imported only where it is
needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# prompt ids, new tokens -> (seconds to the first token, seconds for the rest, tokens, share kept or None)
Call = Callable[[list[int], int], tuple[float, float, list[int], float | None]]


def gsx_call(path: Path, threads: int, budget: float | None) -> Call:
    """gsx's own runner and loop."""
    from gsx_engines.bundle.bundle import open_bundle
    from gsx_engines.bundle.controls import KeepSettings
    from gsx_engines.generation import generate
    from gsx_engines.runners.select import open_runner

    runner = open_runner(open_bundle(path), threads=threads)

    def call(prompt: list[int], new_tokens: int) -> tuple[float, float, list[int], float | None]:
        found = generate(runner, [prompt], max_new_tokens=new_tokens, keep=KeepSettings(budget=budget), stop_ids=[])
        stats = found.stats
        return stats.prefill_seconds, stats.decode_seconds, found.sequences[0].tokens, stats.kept_share

    return call


def genai_call(path: Path, threads: int) -> Call:
    """ONNX Runtime GenAI on a model that its own builder made."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def call(prompt: list[int], new_tokens: int) -> tuple[float, float, list[int], float | None]:
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
        return first - started, time.perf_counter() - first, tokens, None

    return call


def llama_call(path: Path, threads: int, context: int, exact: bool) -> Call:
    """llama.cpp on a GGUF file (`llama.py`), with its flash attention and 16-bit K and V, or all in float32."""
    import llama_cpp

    options: dict[str, Any] = {"n_ctx": context, "n_batch": context, "n_ubatch": context}
    options |= {"n_threads": threads, "n_threads_batch": threads, "flash_attn": not exact, "verbose": False}
    if exact:
        options |= {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(path), **options)

    def after(tokens: list[int]) -> int:
        model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def call(prompt: list[int], new_tokens: int) -> tuple[float, float, list[int], float | None]:
        model.reset()
        started = time.perf_counter()
        tokens = [after(prompt)]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            tokens.append(after(tokens[-1:]))
        return first - started, time.perf_counter() - first, tokens, None

    return call


def peak_mb() -> float:
    """Peak memory of this process. (`ru_maxrss` is at least that of the process that started it.)"""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024


def main() -> None:
    """Serve calls until standard input ends."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    path, threads = Path(spec["path"]), spec["threads"]
    if spec["kind"] == "llama":
        call = llama_call(path, threads, spec["context"], spec["exact"])
    else:
        call = genai_call(path, threads) if spec["kind"] == "genai" else gsx_call(path, threads, spec.get("budget"))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        call(request["prompt"], 2)  # the first call after a pause is slower, whatever the model
        prefill, decode, tokens, kept = call(request["prompt"], request["new_tokens"])
        answer = {"prefill": prefill, "decode": decode, "tokens": tokens, "kept": kept, "peak_mb": peak_mb()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
