"""Opening bundles and engines in C++: it refuses the same ones as Python, with the same messages."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import open_bundle, write_manifest
from gsx_engines.bundle.engine_entry import EngineEntry, EngineGraph, PluginLibrary
from gsx_engines.tensorrt.backend import platform_name
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES, EngineSet, Machine, difference, read_engine
from gsx_plugins.errors import GsxError

NAME, BACKEND = "tensorrt-rtx-sm89", "tensorrt-rtx"
PLAN, LIBRARY = b"engine", b"plugins"


@dataclass(frozen=True)
class Here:
    """The machine, as described to both languages."""

    version: str = "1.7.1.116"
    gpu: str = "GeForce"
    capability: str = "89"
    graph: str = "model"
    library: bytes | None = LIBRARY


@dataclass(frozen=True)
class Case:
    """A difference: of the machine, of the engines' record, or by an edit of the directory."""

    says: str
    here: Here = Here()
    entry: dict[str, Any] = field(default_factory=dict)
    graph: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Path], object] = lambda directory: None


def engine_file(directory: Path, name: str = "model.engine") -> Path:
    return directory / ENGINES / NAME / name


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An edit of gsx.json."""

    def edit(directory: Path) -> None:
        path = directory / "gsx.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return edit


def edit_record(directory: Path, **fields: object) -> None:
    path = engine_file(directory, ENGINE_FILE)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


CASES = {
    "fits": Case("tensorrt-rtx-sm89 6"),
    "another version": Case("tensorrt_version differs", Here(version="1.8.0.1")),
    "another GPU": Case("targets do not include this GPU (H200)", Here(gpu="H200", capability="90")),
    "another GPU model": Case("gpu differs", entry={"gpu": "GeForce RTX 4090"}),
    "another platform": Case("platform differs", entry={"platform": "win32-amd64"}),
    "another plugin library": Case("expected sha256", Here(library=b"others")),
    "no plugin library": Case("found no plugin library", Here(library=None)),
    "no plugins needed": Case("tensorrt-rtx-sm89 6", Here(library=None), entry={"plugins": None}),
    "K and V that grow": Case("kv_layout differs", entry={"kv_layout": "growing"}),
    "exported again": Case("model.onnx sha256 differs", graph={"graph_sha256": "1" * 64}),
    "other weights": Case("weights of model differs", graph={"weights_sha256": "1" * 64}),
    "a graph without engine": Case("there is no engine of draft", Here(graph="draft")),
    "a record that is gone": Case("found no readable file", edit=lambda d: engine_file(d, ENGINE_FILE).unlink()),
    "a record that is no JSON": Case("no readable file", edit=lambda d: engine_file(d, ENGINE_FILE).write_text("{")),
    "a record of another engine": Case(
        'gpu in engine.json does not match gsx.json\n  expected null, found "NVIDIA L4"',
        edit=lambda d: edit_record(d, gpu="NVIDIA L4"),
    ),
    "a record of another profile": Case(
        "profiles.0.tokens.2 in engine.json does not match gsx.json\n  expected 64, found 65",
        edit=lambda d: edit_record(d, profiles=[p.model_dump() for p in default_profiles(65, 1)]),
    ),
    "a record without targets": Case(
        "targets in engine.json does not match gsx.json\n  expected nothing, found null",
        edit=lambda d: edit_record(d, targets=[]),
    ),
    "an engine cut short": Case("found 5 bytes", edit=lambda d: engine_file(d).write_bytes(PLAN[:5])),
    "an engine that is gone": Case("found no such file", edit=lambda d: engine_file(d).unlink()),
    "other bytes": Case("sha256 differs", edit=lambda d: engine_file(d).write_bytes(PLAN.upper())),
    "no bundle": Case("is not a bundle", edit=lambda d: (d / "gsx.json").unlink()),
    "no directory": Case("no such directory", edit=shutil.rmtree),
    "a graph that changed": Case("does not match gsx.json", edit=lambda d: (d / "model.onnx").write_bytes(b"onnx")),
    "a graph that is gone": Case("model.onnx is missing", edit=lambda d: (d / "model.onnx").unlink()),
    "weights cut short": Case("is incomplete", edit=lambda d: (d / "weights.bin").write_bytes(b"weights")),
    "another format": Case("found schema_version 2", edit=edited(lambda m: m.update(schema_version=2))),
    "no format": Case("found schema_version None", edit=edited(lambda m: m.pop("schema_version"))),
}


@pytest.fixture
def make_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[[Case], Path]:
    """A bundle with recorded engines (their files are not engines, and are never given to TensorRT)."""

    def make(case: Case) -> Path:
        directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
        manifest = open_bundle(directory).manifest
        engine_file(directory).parent.mkdir(parents=True)
        engine_file(directory).write_bytes(PLAN)
        graph = EngineGraph(
            file="model.engine",
            sha256=hashlib.sha256(PLAN).hexdigest(),
            size_bytes=len(PLAN),
            graph_sha256=manifest.graphs["model"].sha256,
            weights_sha256=manifest.weights.sha256,
            forms={},
            layers={},
            inputs=(),
            outputs=(),
            build_seconds=1.0,
            peak_bytes=1,
        )
        entry = EngineEntry(
            schema_version=1,
            backend=BACKEND,
            tensorrt_version="1.7.1.116",
            targets=("86", "89"),
            platform=platform_name(),
            gpu=None,
            precision="fp32",
            capacity=64,
            profiles=default_profiles(64, 1),
            plugins=PluginLibrary(sha256=hashlib.sha256(LIBRARY).hexdigest(), source_hash="0" * 64),
            graphs={"model": graph.model_copy(update=case.graph)},
        ).model_copy(update=case.entry)
        engine_file(directory, ENGINE_FILE).write_text(entry.model_dump_json(indent=2))
        write_manifest(directory, manifest.model_copy(update={"engines": {NAME: entry}}))
        case.edit(directory)
        return directory

    return make


def python_says(directory: Path, here: Here) -> str:
    library = hashlib.sha256(here.library).hexdigest() if here.library else None
    machine = Machine(here.version, platform_name(), here.gpu, here.capability, library)
    command = f"gsx build {directory} --backend {BACKEND}"
    try:
        bundle = open_bundle(directory)
        entry = bundle.manifest.engines[NAME]
        problem = difference(bundle, NAME, entry, machine, command)
        if problem:
            raise problem
        engines = EngineSet(directory / ENGINES / NAME, entry, None)
        return f"{engines.directory} {len(read_engine(engines, here.graph, command))}"
    except GsxError as error:
        return str(error)


def cpp_says(build: Path, directory: Path, here: Here, monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    monkeypatch.delenv("GSX_PLUGIN_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    arguments = [str(directory), BACKEND, here.version, here.gpu, here.capability, here.graph]
    if here.library:
        library = directory.parent / "libgsx_plugins.so"
        library.write_bytes(here.library)
        arguments.append(str(library))
    command = [str(build / "tests/gsx_check_bundle"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert not done.stderr
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize("name", CASES)
def test_the_same_words(
    name: str, cpp_build: Path, make_bundle: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = CASES[name]
    directory = make_bundle(case)
    found = cpp_says(cpp_build, directory, case.here, monkeypatch, tmp_path)
    assert found == python_says(directory, case.here)
    assert case.says in found


def at(*path: str | int) -> Callable[[dict[str, Any]], Any]:
    """The manifest's value at a path of keys."""

    def reach(manifest: dict[str, Any]) -> Any:
        for step in path:
            manifest = manifest[step]  # type: ignore[index]
        return manifest

    return reach


# What is edited -> the place that C++ names; Python refuses each of them too.
EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda m: m.update(extra=1), "extra: is not known"),
    "missing key": (lambda m: m["decoder"].pop("vocab_size"), "decoder.vocab_size: is missing"),
    "wrong type": (lambda m: m["decoder"].update(num_layers="four"), "decoder.num_layers: must be of type integer"),
    "no whole number": (
        lambda m: m["weights"].update(size_bytes=1.5),
        "weights.size_bytes: must be of type integer",
    ),
    "outside": (lambda m: m["weights"].update(file="../weights.bin"), "weights.file: does not match"),
    "absolute": (lambda m: m["graphs"]["model"].update(file="/etc/passwd"), "graphs.model.file: does not match"),
    "engines outside": (lambda m: m["engines"].update({"../up": m["engines"].pop(NAME)}), "engines.../up: does not"),
    "hash": (lambda m: m["weights"].update(sha256="AB" * 32), "weights.sha256: does not match"),
    "budget": (lambda m: m["selection"].update(budget=0), "selection.budget: must be above 0"),
    "mode": (lambda m: m["selection"].update(mode="luck"), "selection.mode: must be one of"),
    "order": (lambda m: m["selection"]["grid"].reverse(), "needs a grid of distinct budgets in descending order"),
    "no grid": (lambda m: m["selection"].update(grid=[]), "needs a grid of distinct budgets in descending order"),
    "a row": (lambda m: m["selection"]["grid"][0]["thresholds"].pop(), "thresholds are for"),
    "a column": (lambda m: m["selection"]["grid"][0]["thresholds"][0].pop(), "has the wrong number of items"),
    "gates alone": (
        lambda m: m.update(selection=None),
        "a selection requires a policy that reads thresholds or a budget",
    ),
    "a policy without gates": (lambda m: m.update(gates=None), "the policy gateskip needs gates"),
    "a parameter of another policy": (
        lambda m: m["policy"]["parameters"].update(stride=2),
        "policy.parameters.stride: is not known",
    ),
    "a policy without its parameters": (
        lambda m: m["policy"].update(name="ffn-skip"),
        "policy.parameters.stride: is missing",
    ),
    "a policy without a name": (lambda m: m["policy"].pop("name"), "policy.name: must name one of the known kinds"),
    "a layer that is not there": (
        lambda m: m["policy"].update(layers=[0, 99]),
        "the policy names layer 99, the model has",
    ),
    "a threshold without a measure": (
        lambda m: m["policy"]["inputs"].append({"name": "exit_threshold", "least": 0, "most": 1}),
        "a policy that reads an exit threshold needs its range and its exported value",
    ),
    "no model": (lambda m: m["graphs"].update(other=m["graphs"].pop("model")), "graphs lacks model"),
    "a draft of no kind": (lambda m: m.update(draft={"draft": {"layer": 1}}), "draft.draft.kind: must name"),
    "an exit too deep": (
        lambda m: m.update(draft={"draft": {"kind": "exit", "layer": 99}}),
        "the draft exits after 99",
    ),
    "a profile": (lambda m: at("engines", NAME, "profiles", 0)(m).update(tokens=[8, 4, 2]), "not least <= usual"),
    "engine file": (lambda m: at("engines", NAME, "graphs", "model")(m).update(file="a/b"), "does not match"),
    "no list": (lambda m: m["decoder"].update(eos_ids=7), "decoder.eos_ids: must be of type array"),
    "huge": (lambda m: m["decoder"].update(max_positions=2**64), "decoder.max_positions: must be of type integer"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest(
    name: str, cpp_build: Path, make_bundle: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, place = EDITS[name]
    here = Here()
    directory = make_bundle(Case("", edit=edited(change)))
    found = cpp_says(cpp_build, directory, here, monkeypatch, tmp_path)
    assert f"{directory}/gsx.json: is not a valid manifest" in found
    assert place in found
    assert "the file was edited: restore it, or run `gsx export` again" in found
    if name != "huge":  # Python's integers are unbounded
        assert "is not a valid manifest" in python_says(directory, here)


def test_a_policy_of_another_package(
    cpp_build: Path, make_bundle: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bundle that another package's rule exported runs without that package, in both languages."""

    def rename(manifest: dict[str, Any]) -> None:
        manifest["policy"].update(name="norm-skip", parameters={"skipped": ["attn", "mlp"]})

    here = Here()
    directory = make_bundle(Case("", edit=edited(rename)))
    found = cpp_says(cpp_build, directory, here, monkeypatch, tmp_path)
    assert found == python_says(directory, here)
    assert "is not a valid manifest" not in found


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema_version": 1, "x": "\\ud800"}', "\x00", "null"])
def test_a_file_that_is_not_a_manifest(
    text: str, cpp_build: Path, make_bundle: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = make_bundle(Case("", edit=lambda d: (d / "gsx.json").write_text(text)))
    found = cpp_says(cpp_build, directory, Here(), monkeypatch, tmp_path)
    assert found.startswith(f"{directory}/gsx.json: ")
    assert "is not readable JSON" in found or "was written in another format" in found
