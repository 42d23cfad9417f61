"""The process that builds one engine.

`python -m gsx_engines.building.worker FD` reads a job from stdin and writes events to the file descriptor FD.
An event is a line of JSON: `{"phase", "done", "total"}` during the build, and finally `{"built": ...}`,
`{"refused", "op", "node"}` or `{"failed"}`. `job.py` is the other end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from gsx_plugins.library import PLUGIN_OPS, STEP_OPS

# Least time between two messages about one phase.
_QUIET_SECONDS = 0.1
_MAX_TEXT = 600
# On a machine without a driver, TensorRT-RTX adds this error to every failure, although a build needs no driver.
_NO_DRIVER = "cudaError 35"


class _BuildError(Exception):
    """Ends the process with a final event."""

    def __init__(self, **event: str) -> None:
        self.event = event


class _Events:
    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(self, event: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(event) + "\n")  # a single write, so that threads do not mix their lines
        self._stream.flush()


def main() -> int:
    """Build the engine of the job on stdin; returns the exit code."""
    events = _Events(int(sys.argv[1]))
    try:
        events.send({"built": _build(json.load(sys.stdin), events)})
    except _BuildError as failure:
        events.send(failure.event)
        return 1
    return 0


def _build(job: Mapping[str, Any], events: _Events) -> dict[str, Any]:
    from gsx_engines.building.job import LOADING_PLUGINS
    from gsx_engines.building.layer_information import product_types
    from gsx_engines.building.plan import steps_of
    from gsx_engines.errors import EngineError
    from gsx_engines.tensorrt.backend import load_module
    from gsx_engines.tensorrt.plugins import load_plugins

    trt = load_module(job["backend"])  # before Polygraphy loads it: plugins need a special way of loading
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile, engine_bytes_from_network
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if job["plugins"]:
        events.send({"phase": LOADING_PLUGINS, "done": 0, "total": 0})
        try:
            load_plugins(builder.get_plugin_registry(), Path(job["plugins"]))
        except EngineError as error:
            message = f" ({logger.last()})" if logger.last() else ""
            raise _BuildError(failed=f"{error.what}: {error.found}{message}", todo=str(error.todo)) from error
    network = _parse(trt, builder, logger, job)
    named_layers = [(network.get_layer(n).name, _type_of(network.get_layer(n))) for n in range(network.num_layers)]
    layers = Counter(kind for _, kind in named_layers)
    plugins = {name for name, kind in named_layers if kind.startswith("PLUGIN")}
    if missing := [name for name in job["plugin_nodes"] if name not in plugins]:
        raise _BuildError(
            failed=f"{len(missing)} of {len(job['plugin_nodes'])} nodes that should be plugins became other layers, "
            f"the first is {missing[0]!r}",
            todo="the graph was edited, or made for other plugins: run `gsx export` again",
        )
    profiles = []
    for ranges in job["profiles"]:
        profile = Profile()
        for name, (least, usual, most) in ranges.items():
            profile.add(name, min=least, opt=usual, max=most)
        profiles.append(profile)
    options = {
        "profiles": profiles,
        "progress_monitor": _monitor(trt, events),
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if job["backend"] == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [(int(target[:-1]), int(target[-1])) for target in job["targets"]]
        config = CreateConfigRTX(compute_capabilities=capabilities or None, use_gpu=not capabilities, **options)
        # float32 must not become TensorFloat-32, unless that holds every factor exactly. (The flag is set by default.)
        if not job["tf32"]:
            config = PostprocessConfig(config, lambda builder, network, made: made.clear_flag(trt.BuilderFlag.TF32))
    else:
        config = CreateConfig(load_timing_cache=job["timing_cache"], tf32=job["tf32"], **options)
    started = time.monotonic()
    try:
        with Path(job["engine"]).open("wb") as file:
            if job["backend"] == "tensorrt-rtx":  # directly into the file, so that the engine is never all in memory
                made = builder.build_serialized_network_to_stream(network, config(builder, network), _writer(trt, file))
            else:
                cache = job["timing_cache"]
                plan = engine_bytes_from_network((builder, network), config=config, save_timing_cache=cache)
                made = file.write(memoryview(plan))
    except PolygraphyException as error:
        raise _BuildError(failed=logger.last() or str(error)[:_MAX_TEXT]) from error
    if not made:
        raise _BuildError(failed=logger.last())
    seconds = time.monotonic() - started
    return {
        "tensorrt_version": trt.__version__,
        "layers": dict(layers),
        "products": product_types("\n".join(logger.layers), job["products"]),
        "steps": [asdict(step) for step in steps_of("\n".join(logger.layers))],
        "peak_bytes": _peak_bytes(),
        "seconds": seconds,
    }


def _peak_bytes() -> int:
    """Peak memory of this process. (`ru_maxrss` is at least that of the parent process.)"""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parse(trt: Any, builder: Any, logger: Any, job: Mapping[str, Any]) -> Any:
    """The graph as a strongly typed TensorRT network: all precisions come from the graph."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(job["graph"]).read_bytes(), job["beside"]):
        first = parser.get_error(0)
        refused = logger.of_plugin() or _reason(first)
        raise _BuildError(refused=refused, op=first.node_operator(), node=first.node_name())
    return network


def _reason(error: Any) -> str:
    """Why the parser refused a node. If it only says that a condition was false, its code and function say more."""
    said = _line(" ".join(line for line in error.desc().splitlines() if _NO_DRIVER not in line))
    code = str(error.code()).rpartition(".")[2]
    return said if said not in ("", "false") else f"{code}, says {error.func()}"


def _type_of(layer: Any) -> str:
    return str(layer.type).rpartition(".")[2]


def _logger(trt: Any) -> Any:
    from gsx_engines.building.layer_information import is_information

    class Logger(trt.ILogger):
        """Keeps errors and the messages about the engine's layers, and drops all other messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)
            elif is_information(text):
                self.layers.append(text)

        def last(self) -> str:
            """What went wrong, in one line: a plugin's message, else TensorRT's last error."""
            errors = [text for text in self.errors if _NO_DRIVER not in text] or self.errors
            return self.of_plugin() or (_line(errors[-1]) if errors else "")

        def of_plugin(self) -> str:
            """The first message of a plugin; these begin with the plugin's name."""
            return next((_line(text) for text in self.errors if text.partition(":")[0] in (*PLUGIN_OPS, *STEP_OPS)), "")

    return Logger()


def _writer(trt: Any, file: IO[bytes]) -> Any:
    class Writer(trt.IStreamWriter):
        """Receives an engine piece by piece."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def _line(text: str) -> str:
    return " ".join(text.split())[:_MAX_TEXT]


def _monitor(trt: Any, events: _Events) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports TensorRT's current phase. Several threads may call it; it does not matter if a message is lost."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.reported_at = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            self._report(phase_name, 0, force=True)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

        def _report(self, phase: str, done: int, *, force: bool = False) -> None:
            now = time.monotonic()
            if force or now - self.reported_at >= _QUIET_SECONDS:
                self.reported_at = now
                events.send({"phase": phase, "done": done, "total": self.totals.get(phase, 0)})

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
