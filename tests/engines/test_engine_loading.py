"""Engines that do not match the machine, the bundle or their own record: the error names the difference and its fix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, open_bundle, sha256_of, write_manifest
from gsx_engines.bundle.engine_entry import EngineEntry, EngineGraph, PluginLibrary
from gsx_engines.errors import EngineError
from gsx_engines.generation.generate import generate
from gsx_engines.runners.select import open_runner
from gsx_engines.tensorrt import cuda, execution, loading
from gsx_engines.tensorrt.backend import platform_name
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES, EngineSet, Machine, difference, find_engines, read_engine
from tests.engines.cpu_engine import cpu_engines
from tests.engines.standin_gpu import CAPACITY, StandInCuda, StandInTensorRT

NAME = "tensorrt-rtx-sm89"
COMMAND = "gsx build OUT --backend tensorrt-rtx"
HASH = "ab" * 32
MACHINE = Machine("1.7.1", platform_name(), "GeForce", "89", HASH)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle with recorded engines (their files are not engines, and are never given to TensorRT)."""
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    opened = open_bundle(directory)
    manifest = opened.manifest
    folder = directory / ENGINES / NAME
    folder.mkdir(parents=True)
    (folder / "model.engine").write_bytes(b"engine")
    graph = EngineGraph(
        file="model.engine",
        sha256="4ea5d5c3b5c2ccb3bcaee2aa4f4e9f1e2c1ab2b2d5a5d5c3b5c2ccb3bcaee2aa",
        size_bytes=6,
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
        backend="tensorrt-rtx",
        tensorrt_version="1.7.1",
        targets=("86", "89"),
        platform=platform_name(),
        gpu=None,
        precision="fp32",
        capacity=64,
        profiles=default_profiles(64, 1),
        plugins=PluginLibrary(sha256=HASH, source_hash="0"),
        graphs={"model": graph},
    )
    return record(Bundle(directory, manifest), entry)


def record(bundle: Bundle, entry: EngineEntry) -> Bundle:
    """Write an entry in both places."""
    (bundle.directory / ENGINES / NAME / ENGINE_FILE).write_text(entry.model_dump_json())
    write_manifest(bundle.directory, bundle.manifest.model_copy(update={"engines": {NAME: entry}}))
    return open_bundle(bundle.directory)


def changed(bundle: Bundle, **fields: Any) -> tuple[Bundle, EngineEntry]:
    entry = bundle.manifest.engines[NAME].model_copy(update=fields)
    return record(bundle, entry), entry


def test_no_difference(bundle: Bundle) -> None:
    assert difference(bundle, NAME, bundle.manifest.engines[NAME], MACHINE, COMMAND) is None


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"tensorrt_version": "1.8.0"}, r"tensorrt_version differs\n  expected 1.7.1, found 1.8.0\n  gsx build OUT"),
        (
            {"platform": "win32-amd64"},
            rf"platform differs\n  expected {platform_name()}, found win32-amd64\n  gsx build",
        ),
        (
            {"gpu": "H200", "capability": "90"},
            r"do not include this GPU \(H200\)\n  expected 9.0, found 8.6, 8.9\n"
            r"  gsx build OUT .* --target 9.0; .*--backend tensorrt$",
        ),
        (
            {"plugins_sha256": "cd" * 32},
            r"the plugin library differs\n  expected sha256 abababababab..., found cdcdcdcdcdcd...\n  gsx build OUT",
        ),
        (
            {"plugins_sha256": None},
            r"the plugin library differs\n  expected sha256 abababababab..., found no plugin library\n  gsx plugins",
        ),
    ],
)
def test_another_machine(bundle: Bundle, machine: dict[str, Any], message: str) -> None:
    problem = difference(bundle, NAME, bundle.manifest.engines[NAME], replace(MACHINE, **machine), COMMAND)
    with pytest.raises(EngineError, match=message):
        raise problem if problem else AssertionError("no difference was found")


def test_an_engine_of_one_gpu_model(bundle: Bundle) -> None:
    opened, entry = changed(bundle, gpu="GeForce RTX 4090")
    problem = difference(opened, NAME, entry, MACHINE, COMMAND)
    assert "gpu differs\n  expected GeForce RTX 4090, found GeForce\n" in str(problem)


def test_k_and_v_that_grow(bundle: Bundle) -> None:
    opened, entry = changed(bundle, kv_layout="growing")
    problem = difference(opened, NAME, entry, MACHINE, COMMAND)
    assert f"kv_layout differs\n  expected in-place, found growing\n  {COMMAND}" in str(problem)


def test_engines_of_a_bundle_that_was_exported_again(bundle: Bundle) -> None:
    graph = bundle.manifest.engines[NAME].graphs["model"]
    for field, what in (("graph_sha256", "model.onnx sha256"), ("weights_sha256", "weights of model")):
        opened, entry = changed(bundle, graphs={"model": graph.model_copy(update={field: "1" * 64})})
        problem = difference(opened, NAME, entry, MACHINE, COMMAND)
        assert f"{what} differs" in str(problem)
        assert "found 111111111111" in str(problem)
        assert COMMAND in str(problem)


@pytest.mark.parametrize("text", [None, "{", json.dumps({"backend": "tensorrt"})])
def test_a_record_that_was_edited(bundle: Bundle, text: str | None) -> None:
    path = bundle.directory / ENGINES / NAME / ENGINE_FILE
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    problem = difference(bundle, NAME, bundle.manifest.engines[NAME], MACHINE, COMMAND)
    assert "engine.json does not match gsx.json" in str(problem)
    assert COMMAND in str(problem)


def test_a_record_of_another_engine_names_the_field(bundle: Bundle) -> None:
    entry = bundle.manifest.engines[NAME]
    graph = entry.graphs["model"]
    other = entry.model_copy(update={"graphs": {"model": graph.model_copy(update={"size_bytes": 7})}})
    problem = difference(bundle, NAME, other, MACHINE, COMMAND)
    message = f"graphs.model.size_bytes in engine.json does not match gsx.json\n  expected 7, found {graph.size_bytes}"
    assert message in str(problem)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"engin", r"is incomplete\n  expected 6 bytes, found 5 bytes\n"),
        (None, r"is incomplete\n  expected 6 bytes, found no such file\n"),
        (b"ENGINE", r"sha256 differs\n  expected 4ea5d5c3b5c2..., found [0-9a-f]{12}\.\.\.\n  .*gsx build OUT"),
    ],
)
def test_a_file_that_is_not_the_engine(bundle: Bundle, content: bytes | None, message: str) -> None:
    engines = EngineSet(bundle.directory / ENGINES / NAME, bundle.manifest.engines[NAME], None)
    path = engines.directory / "model.engine"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(EngineError, match=message):
        read_engine(engines, "model", COMMAND)


def test_an_engine_for_a_graph_that_has_none(bundle: Bundle) -> None:
    engines = EngineSet(bundle.directory / ENGINES / NAME, bundle.manifest.engines[NAME], None)
    with pytest.raises(EngineError, match=r"there is no engine of draft\n  found model\n  gsx build OUT"):
        read_engine(engines, "draft", COMMAND)


def test_of_several_versions_the_one_that_fits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """If none fits, the error is about the engines for this GPU and this version, which are nearest to fitting."""
    made = bundle.manifest.engines[NAME].model_copy(update={"plugins": None})
    entries = {
        "other-gpu": made.model_copy(update={"targets": ("120",)}),
        "older": made.model_copy(update={"tensorrt_version": "1.6"}),
        "here": made,
    }
    for name, entry in entries.items():
        (bundle.directory / ENGINES / name).mkdir()
        (bundle.directory / ENGINES / name / ENGINE_FILE).write_text(entry.model_dump_json())
    several = Bundle(bundle.directory, bundle.manifest.model_copy(update={"engines": entries}))
    monkeypatch.setattr(loading, "load_module", lambda backend: SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setattr(loading, "find_library", lambda: None)
    monkeypatch.setattr(cuda, "runtime", lambda: None)
    monkeypatch.setattr(cuda, "device", lambda: cuda.Device("GeForce", "89", 1 << 34))
    assert find_engines(several, "tensorrt-rtx").directory.name == "here"
    (bundle.directory / ENGINES / "here" / ENGINE_FILE).unlink()
    with pytest.raises(EngineError, match=r"engines/here: engine\.json does not match"):
        find_engines(several, "tensorrt-rtx")


def test_a_bundle_without_engines(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"has no engines for tensorrt-rtx\n  found none\n  gsx build .*tensorrt-rtx"):
        open_runner(open_bundle(tiny_bundle), backend="tensorrt-rtx")


@pytest.mark.skipif(cuda.device() is not None, reason="there is a GPU here")
def test_a_machine_without_a_gpu(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    with pytest.raises(EngineError, match=r"no NVIDIA GPU can be used\n.*\n.*ONNX Runtime runs the bundle"):
        open_runner(bundle, backend="tensorrt-rtx")


def damaged(file: Path, trt: StandInTensorRT) -> None:
    """A file that was not copied whole."""
    file.write_bytes(b"engin")


def refused(file: Path, trt: StandInTensorRT) -> None:
    """An engine that TensorRT does not load, such as for want of memory."""
    trt.takes = False


def built_elsewhere(file: Path, trt: StandInTensorRT) -> None:
    """Engines whose record does not fit."""
    (file.parent / ENGINE_FILE).write_text("{}")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damaged, "model.engine: is incomplete"),
        (refused, "cannot load the engine"),
        (built_elsewhere, "does not match gsx.json"),
        (None, None),
    ],
)
def test_steps_that_cannot_be_used_are_left_out_with_a_warning(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    harm: Callable[[Path, StandInTensorRT], None] | None,
    reason: str | None,
) -> None:
    """They are only faster: the others write the same text."""
    opened = open_bundle(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))
    gpu, sets = StandInCuda(), {}
    general, engines = cpu_engines(opened, default_profiles(CAPACITY, 1), capacity=CAPACITY)
    step, faster = cpu_engines(opened, (), capacity=CAPACITY, step=(1, 1), rows=8)
    made = [StandInTensorRT(gpu, one["model"]) for one in (engines, faster)]
    for name, entry in (("general", general), ("step", step)):
        folder = opened.directory / ENGINES / name
        folder.mkdir(parents=True)
        (folder / "model.engine").write_bytes(b"engine")
        file = {"sha256": sha256_of(folder / "model.engine"), "size_bytes": 6}
        graphs = {"model": entry.graphs["model"].model_copy(update=file)}
        sets[name] = entry.model_copy(update={"backend": "tensorrt", "graphs": graphs})
        (folder / ENGINE_FILE).write_text(sets[name].model_dump_json())
    bundle = Bundle(opened.directory, opened.manifest.model_copy(update={"engines": sets}))
    if harm is not None:
        harm(bundle.directory / ENGINES / "step/model.engine", made[1])
    waiting = list(made)
    monkeypatch.setattr(loading, "load_module", lambda _: made[0])
    monkeypatch.setattr(execution, "load_module", lambda _: waiting.pop(0))
    monkeypatch.setattr(loading, "find_library", lambda: None)
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)
    monkeypatch.setattr(cuda, "device", lambda: cuda.Device("GeForce", "89", 1 << 34))
    found = generate(open_runner(bundle, backend="tensorrt"), [[5, 60, 61]], max_new_tokens=8, stop_ids=[])
    want = generate(open_runner(opened, 1), [[5, 60, 61]], max_new_tokens=8, stop_ids=[])
    assert found.sequences == want.sequences
    assert (made[1].calls > 0) == (harm is None)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert bool(warned) == (reason is not None)
    if reason is not None:
        assert re.search(rf"(?s)engines for all calls, which are slower: .*{re.escape(reason)}.*gsx build", warned[0])
        assert harm is refused or re.search(r"--context \d+ --batch 1 --step 1", warned[0])
