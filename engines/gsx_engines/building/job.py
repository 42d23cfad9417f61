"""Building one engine in a process of its own: what the process is given, and how it is run.

TensorRT builds in a separate process because its parser may end the process on unexpected input, Polygraphy chooses
between TensorRT and TensorRT-RTX only once, at import, and memory is freed reliably when a process ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import gsx_engines
import gsx_plugins
from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.backend import Backend
from gsx_plugins.progress import OnProgress, Progress, silent

# Smallest, usual and largest shape of an input; or its values, if it is on the host.
Ranges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
LOADING_PLUGINS = "loading the plugin library"

_TURING = "75"
_NO_TURING = "TensorRT-RTX has no FP32 and no bf16 products on 7.5: use --target 8.0 or later"
_REPORT = "report it with the output of `gsx doctor`"


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Args:
        backend: which TensorRT.
        graph: file with the lowered graph, without weights.
        beside: a file in the folder with the weights that the graph refers to.
        engine: file to write.
        targets: compute capabilities, e.g. "89"; empty for the GPU of this machine.
        profiles: for each profile, the ranges of every dynamic input.
        plugins: the plugin library, or None.
        plugin_nodes: names of the nodes that must become plugins.
        products: names of the graph's matrix products.
        timing_cache: file for timings, if the backend uses them.
        tf32: whether float32 products may use TensorFloat-32: only where it holds all their factors exactly.
    """

    backend: Backend
    graph: str
    beside: str
    engine: str
    targets: tuple[str, ...]
    profiles: tuple[Ranges, ...]
    plugins: str | None
    plugin_nodes: tuple[str, ...]
    products: tuple[str, ...]
    timing_cache: str | None
    tf32: bool = False


@dataclass(frozen=True)
class Built:
    """What the process reports at its end.

    Args:
        tensorrt_version: of the builder.
        layers: type of TensorRT layer -> how many, before TensorRT fuses them.
        products: matrix product -> the type in which it is computed (`layer_information.product_types`).
        steps: what a call of the engine does, as `plan.Step` in JSON.
        peak_bytes: peak memory of the process.
        seconds: time of the build itself.
    """

    tensorrt_version: str
    layers: Mapping[str, int]
    products: Mapping[str, str]
    steps: Sequence[Mapping[str, Any]]
    peak_bytes: int
    seconds: float


def run_job(job: Job, name: str, on_progress: OnProgress = silent) -> Built:
    """Build an engine in a process of its own.

    Args:
        name: of the graph, for messages.
        on_progress: called as TensorRT goes through its phases; the note is the phase.
    Raises:
        EngineError: TensorRT refuses the graph (names op and node), fails, or takes its process down.
    """
    with tempfile.TemporaryFile() as noise:
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "gsx_engines.building.worker", str(writing)],
                stdin=subprocess.PIPE,
                stdout=noise,
                stderr=noise,
                env=_environment(job.backend),
                pass_fds=(writing,),
                start_new_session=True,  # so that a Ctrl-C only reaches this process, which then ends the other
            )
        finally:
            os.close(writing)
        with open(reading, encoding="utf-8") as events:
            try:
                _send(process, job)
                last_phase, answer = _follow(events, name, on_progress)
                code = process.wait()
            finally:
                process.kill()
                process.wait()
        if code == 0 and answer is not None and "built" in answer:
            return Built(**answer["built"])
        raise _failure(job, name, code, answer, last_phase, noise)


def _send(process: subprocess.Popen[bytes], job: Job) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(asdict(job)).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it read: its exit code says why


def _follow(events: IO[str], name: str, on_progress: OnProgress) -> tuple[str, dict[str, Any] | None]:
    """Pass progress on until the process ends. Returns: its last phase, and its final event, if there was one."""
    phase, answer = "", None
    for line in events:
        event = json.loads(line)
        if "phase" in event:
            phase = event["phase"]
            on_progress(Progress(f"building {name}", event["done"], event["total"], phase))
        else:
            answer = event
    return phase, answer


def _environment(backend: Backend) -> dict[str, str]:
    homes = dict.fromkeys(str(Path(package.__path__[0]).parent) for package in (gsx_engines, gsx_plugins))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*homes, os.environ.get("PYTHONPATH")])),
        "POLYGRAPHY_AUTOINSTALL_DEPS": "0",
        "POLYGRAPHY_USE_TENSORRT_RTX": "1" if backend == "tensorrt-rtx" else "0",
    }


def _failure(
    job: Job, name: str, code: int, answer: dict[str, Any] | None, phase: str, noise: IO[bytes]
) -> EngineError:
    """The error that describes how the process ended."""
    answer = answer or {}
    thing = f"{name}.onnx: {job.backend}"
    report = _REPORT if job.plugins is None else f"--plugins none may work; {_REPORT}"
    if "refused" in answer:
        return EngineError(
            f"{thing} refuses the op {answer['op']} of node {answer['node']!r}",
            found=answer["refused"],
            todo="the graph runs in ONNX Runtime; gsx doctor shows which plugins are available",
        )
    if "failed" in answer:
        todo = answer.get("todo") or (_NO_TURING if _TURING in job.targets else report)
        return EngineError(f"{thing} could not build an engine", found=answer["failed"], todo=todo)
    noise.seek(0)
    lines = noise.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    if code == -signal.SIGKILL:
        return EngineError(
            f"{thing} was killed by the system while it built an engine",
            found="most likely the machine ran out of memory",
            todo="build on a machine with more memory, or with shorter --profile ranges",
        )
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    doing = f"while {phase}" if phase == LOADING_PLUGINS else "while it built an engine"
    return EngineError(
        f"{thing} crashed {doing}",
        found=f"{how}: {last}",
        todo="gsx plugins build --force builds the library again" if phase == LOADING_PLUGINS else report,
    )
