"""Which engines of a bundle run here: everything that an engine depends on is checked before TensorRT loads it.

TensorRT's own message for an engine of another version or GPU is a line about a magic tag. The errors here name what
differs, both values, and the command that fixes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.engine_entry import EngineEntry, KvLayout
from gsx_engines.errors import EngineError
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.backend import Backend, dotted, load_module, platform_name
from gsx_plugins.library import find_library, library_hash

ENGINES, ENGINE_FILE = "engines", "engine.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """The properties of this machine that an engine depends on.

    Args:
        tensorrt_version: of the runtime.
        platform: operating system and processor.
        gpu, capability: the GPU's name and its compute capability, such as "89".
        plugins_sha256: of the plugin library; None if there is none.
    """

    tensorrt_version: str
    platform: str
    gpu: str
    capability: str
    plugins_sha256: str | None


@dataclass(frozen=True)
class EngineSet:
    """Engines of a bundle that can be loaded here.

    Args:
        directory: the folder of their files.
        entry: their description.
        library: the plugin library that they need, or None.
    """

    directory: Path
    entry: EngineEntry
    library: Path | None


def find_engines(bundle: Bundle, backend: Backend) -> EngineSet:
    """Find the engines of a bundle for this machine, and check everything except the content of their files.

    Raises:
        EngineError: there are none, or none that runs here.
        PluginLibraryError: the environment names a plugin library that is not there.
    """
    command = f"gsx build {bundle.directory} --backend {backend}"
    of_backend = {name: entry for name, entry in bundle.manifest.engines.items() if entry.backend == backend}
    choices = {name: entry for name, entry in of_backend.items() if entry.kv_layout != "step"}
    if not choices:
        others = ", ".join(bundle.manifest.engines) or "none"
        raise EngineError(f"bundle {bundle.directory}: has no engines for {backend}", found=others, todo=command)
    module = load_module(backend)
    cuda.runtime()
    device = cuda.device()
    assert device is not None
    machine, library = _this_machine(module, device)
    problems = {name: difference(bundle, name, entry, machine, command) for name, entry in choices.items()}
    for name, problem in problems.items():
        if problem is None:
            entry = choices[name]
            return EngineSet(bundle.directory / ENGINES / name, entry, library if entry.plugins else None)
    # Report the engines for this GPU and this TensorRT, if there are any: their message says most.
    near = min(
        choices,
        key=lambda name: (
            machine.capability not in choices[name].targets,
            choices[name].tensorrt_version != machine.tensorrt_version,
        ),
    )
    problem = problems[near]
    assert problem is not None
    raise problem


def find_steps(bundle: Bundle, found: EngineSet) -> list[EngineSet]:
    """The engines for steps of one size that run on this machine and share K/V buffers with those for all calls.

    Where none of a size does, a warning says why: the others do its work, but slower.
    """
    device = cuda.device()
    assert device is not None
    machine, library = _this_machine(load_module(found.entry.backend), device)
    fitting: dict[tuple[int, int], EngineSet] = {}
    problems: dict[tuple[int, int], EngineError] = {}
    for name, entry in bundle.manifest.engines.items():
        if (entry.backend, entry.kv_layout, entry.capacity) != (found.entry.backend, "step", found.entry.capacity):
            continue
        size = entry.profiles[0].batch.most, entry.profiles[0].tokens.most
        problem = difference(bundle, name, entry, machine, build_command(bundle, entry), kv_layout="step")
        if problem is None:
            fitting[size] = EngineSet(bundle.directory / ENGINES / name, entry, library if entry.plugins else None)
        else:
            problems[size] = problem
    for size, problem in problems.items():
        if size not in fitting:
            left_out(problem)
    return list(fitting.values())


def build_command(bundle: Bundle, entry: EngineEntry) -> str:
    """The command that builds a set of engines again; steps only fit engines of the same context."""
    command = f"gsx build {bundle.directory} --backend {entry.backend}"
    if entry.kv_layout != "step":
        return command
    sizes = entry.profiles[0]
    return f"{command} --context {entry.capacity} --batch {sizes.batch.most} --step {sizes.tokens.most}"


def left_out(problem: EngineError) -> None:
    """Warn that engines for steps are not used."""
    _LOG.warning("steps run on the engines for all calls, which are slower: %s", problem.message)


def _this_machine(module: Any, device: cuda.Device) -> tuple[Machine, Path | None]:
    """What engines depend on here, and the plugin library."""
    library = find_library()
    made = Machine(
        module.__version__,
        platform_name(),
        device.name,
        device.capability,
        library_hash(library) if library is not None else None,
    )
    return made, library


def difference(
    bundle: Bundle, name: str, entry: EngineEntry, machine: Machine, command: str, kv_layout: KvLayout = "in-place"
) -> EngineError | None:
    """The first property in which engines and machine differ, as an error; None if they fit.

    Args:
        bundle: the bundle.
        name, entry: of the engines.
        machine: this machine.
        command: the command that builds the engines again.
        kv_layout: that they must have.
    """
    directory = bundle.directory / ENGINES / name
    what = f"engines {directory}"
    recorded = _recorded(directory)
    if recorded is None:
        return EngineError(
            f"{what}: {ENGINE_FILE} does not match gsx.json",
            expected="the entry that `gsx build` wrote",
            found="no readable file",
            todo=command,
        )
    if recorded != entry:
        field, wanted, written = _first_difference(entry, recorded)
        return EngineError(
            f"{what}: {field} in {ENGINE_FILE} does not match gsx.json", expected=wanted, found=written, todo=command
        )
    facts: list[tuple[str, object, object, str]] = [
        ("kv_layout", kv_layout, entry.kv_layout, command),
        ("platform", entry.platform, machine.platform, command),
        ("tensorrt_version", entry.tensorrt_version, machine.tensorrt_version, command),
    ]
    if entry.gpu is not None:
        facts.append(("gpu", entry.gpu, machine.gpu, command))
    for made, wanted, field in (
        (graph.graph_sha256, bundle.manifest.graphs[key].sha256, f"{key}.onnx sha256")
        for key, graph in entry.graphs.items()
        if key in bundle.manifest.graphs
    ):
        facts.append((field, f"{wanted[:12]}...", f"{made[:12]}...", command))
    for key, graph in entry.graphs.items():
        facts.append((f"weights of {key}", bundle.manifest.weights.sha256[:12], graph.weights_sha256[:12], command))
    for field, expected, found, todo in facts:
        if expected != found:
            return EngineError(f"{what}: {field} differs", expected=str(expected), found=str(found), todo=todo)
    if machine.capability not in entry.targets:
        return EngineError(
            f"{what}: targets do not include this GPU ({machine.gpu})",
            expected=dotted(machine.capability),
            found=", ".join(dotted(target) for target in entry.targets),
            todo=f"{command} --target {dotted(machine.capability)}; if TensorRT-RTX does not know this target, "
            f"gsx build {bundle.directory} --backend tensorrt"
            if entry.backend == "tensorrt-rtx"
            else command,
        )
    if entry.plugins is not None and entry.plugins.sha256 != machine.plugins_sha256:
        found = machine.plugins_sha256
        return EngineError(
            f"{what}: the plugin library differs",
            expected=f"sha256 {entry.plugins.sha256[:12]}...",
            found=f"{found[:12]}..." if found else "no plugin library",
            todo=f"{command} builds engines for this library; GSX_PLUGIN_LIBRARY names another one"
            if found
            else "gsx plugins build, or set GSX_PLUGIN_LIBRARY to the library that they were built with",
        )
    return None


def read_engine(engines: EngineSet, graph: str, command: str) -> bytes:
    """An engine's content, checked by size and hash.

    Raises:
        EngineError: no engine of that graph; a missing, truncated or changed file.
    """
    made = engines.entry.graphs.get(graph)
    if made is None:
        raise EngineError(
            f"engines {engines.directory}: there is no engine of {graph}",
            found=", ".join(engines.entry.graphs),
            todo=command,
        )
    path = engines.directory / made.file
    size = path.stat().st_size if path.is_file() else None
    if size != made.size_bytes:
        raise EngineError(
            f"{path}: is incomplete",
            expected=f"{made.size_bytes} bytes",
            found="no such file" if size is None else f"{size} bytes",
            todo=f"copy it again, or {command}",
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != made.sha256:
        raise EngineError(
            f"{path}: sha256 differs",
            expected=f"{made.sha256[:12]}...",
            found=f"{found[:12]}...",
            todo=f"the file changed after it was built: {command}",
        )
    return content


def _recorded(directory: Path) -> EngineEntry | None:
    try:
        return EngineEntry.model_validate(json.loads((directory / ENGINE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def _first_difference(expected: EngineEntry, found: EngineEntry) -> tuple[str, str, str]:
    """The first field in which two entries differ, such as `profiles.0.name`, and both values as JSON."""
    sides = [
        {path: json.dumps(value) for path, value in _leaves(entry.model_dump(mode="json"))}
        for entry in (expected, found)
    ]
    both = {path: tuple(side.get(path, "nothing") for side in sides) for path in sides[0] | sides[1]}
    path, (wanted, written) = min((path, values) for path, values in both.items() if values[0] != values[1])
    return path.removeprefix("/").replace("/", "."), wanted, written


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of a JSON value with their paths in the form of RFC 6901; an empty object or list counts as None."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        yield path, value if items is None else None
        return
    for name, inner in items:
        yield from _leaves(inner, f"{path}/{name}")
