"""The C++ runtime on a real bundle without a GPU: it decodes, and ONNX Runtime in this process runs its engines."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, write_manifest
from tests.engines.cpu_engine import CpuEngine, cpu_engines

_ENGINES = "cpu"


def generate_in_cpp(
    build: Path, bundle: Bundle, folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[dict[str, Any]]:
    """New ids, and why they ended, of each prompt: `{"ids": ..., "finish": ...}`.

    Args:
        build: the folder that CMake built in (`cpp_build`).
        folder: a new one, for a copy of the bundle with a record of the engines.
    """
    capacity = bundle.manifest.decoder.max_positions
    entry, engines = cpu_engines(bundle, default_profiles(capacity, 1), capacity=capacity)
    shutil.copytree(bundle.directory, folder)
    write_manifest(folder, bundle.manifest.model_copy(update={"engines": {_ENGINES: entry}}))
    command = [build / "tests/gsx_piped", folder, _ENGINES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        found = [_answer(process, engines["model"], prompt, max_new_tokens) for prompt in prompts]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    return found


def _answer(
    process: subprocess.Popen[str], engine: CpuEngine, prompt: Sequence[int], max_new_tokens: int
) -> dict[str, Any]:
    """Send a request, and run the engine's calls until its answer comes."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps({"prompt": list(prompt), "max_new_tokens": max_new_tokens}), file=process.stdin, flush=True)
    buffers: dict[int, np.ndarray] = {}
    for line in process.stdout:
        message = json.loads(line)
        if "ids" in message:
            return dict(message)
        if "buffer" in message:
            buffers[message["buffer"]] = engine.buffer(tuple(message["shape"]), message["name"])
            continue
        results = engine.run(
            message["profile"],
            {name: _array(value) for name, value in message["feeds"].items()},
            {name: (buffers[at][row:], tuple(shape)) for name, (at, row, shape) in message["buffers"].items()},
            {name: tuple(shape) for name, shape in message["results"].items()},
        )
        print(json.dumps({name: _written(array) for name, array in results.items()}), file=process.stdin, flush=True)
    raise AssertionError("the C++ process ended without an answer; its message is above")


def _array(value: Mapping[str, Any]) -> np.ndarray:
    return np.array(value["data"], dtype=value["type"]).reshape(value["shape"])


def _written(array: np.ndarray) -> dict[str, Any]:
    kind = "int64" if array.dtype == np.int64 else "float32"
    return {"type": kind, "shape": array.shape, "data": array.reshape(-1).tolist()}
