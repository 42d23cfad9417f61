"""Checks before a build begins: options, memory and disk, plugin library and layout of the graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from gsx_engines.building import build as building
from gsx_engines.building import memory, plugin_targets
from gsx_engines.building.build import build, check_backend
from gsx_engines.errors import BundleError, EngineError
from gsx_engines.tensorrt.loading import ENGINES
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.library import BuildRecord, find_library
from tests.engines.built import build_small, edit_graph, needs_plugins, state


def test_memory_and_disk_are_checked_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(bundle)
    monkeypatch.setattr(building, "run_job", lambda *args: pytest.fail("a build was begun"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: 1 << 20)
        with pytest.raises(EngineError, match=r"not enough memory.*\n.*expected 1.1 GB available.*found 0.0 GB"):
            build_small(bundle)
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(GsxError, match=r"not enough room on the disk.*\n.*expected 0.13 GB free, found 0.00 GB"):
        build_small(bundle)
    assert state(bundle) == before


def test_what_the_system_says_about_memory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's memory, or the container's if that is less; memory used by caches counts as available."""
    found = memory.available_memory()
    assert found is None or found > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3400\ninactive_file 600\n")
    monkeypatch.setattr(memory, "_GROUPS", ((tmp_path, *memory._GROUPS[0][1:]),))
    assert memory.available_memory() == 5000 - 4000 + 600
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "_of_machine", lambda: 7 << 30)  # what is read twice may differ
    assert memory.available_memory() == 7 << 30


def test_without_polygraphy(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX can be installed without it."""
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r'needs Polygraphy.*\n.*\n  pip install "gsx\[tensorrt\]"'):
        build_small(tiny_bundle)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 1}, UsageError, r"--context is out of range\n.*2 to 512, the model's context, found 1"),
        ({"context": 1000}, UsageError, "found 1000"),
        ({"batch": 0}, UsageError, r"--batch is out of range\n.*at least 1"),
        ({"targets": ["9.0"]}, UsageError, r"--target.*\n.*8\.9.*found 9\.0"),
        ({"targets": ["many"]}, UsageError, "--target"),
        ({"profiles": ["decode:1", "decode:1"]}, UsageError, "two profiles have the same name"),
        ({"plugins": Path("nowhere.so")}, UsageError, r"nowhere.so: there is no such plugin library\n.*plugins build"),
        ({"backend": "tensorrt"}, EngineError, "backend tensorrt"),
    ],
)
def test_options_that_cannot_be(
    tiny_bundle: Path, options: dict[str, object], error: type[GsxError], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(tiny_bundle, **options)


def test_a_graph_of_another_layout_is_refused(bundle: Path) -> None:
    def turn(model: onnx.ModelProto) -> None:
        for concat in model.graph.node:
            if concat.op_type == "Concat" and concat.output[0].startswith("present."):
                concat.input[:] = concat.input[::-1]

    edit_graph(bundle, turn)
    with pytest.raises(BundleError, match=r"not laid out as this version of gsx.*\n.*\n.*gsx export"):
        build_small(bundle)


def test_a_file_that_is_not_a_plugin_library(bundle: Path, tmp_path: Path) -> None:
    """A file that is not a library, and a library of something else: each with its own message."""
    empty = tmp_path / "libnothing.so"
    empty.write_bytes(b"\x7fELF" + bytes(np.zeros(64, np.uint8)))
    reasons = {empty: "wrong ELF class", Path(onnxruntime_library()): "no getCreators: it has no TensorRT plugins"}
    for library, reason in reasons.items():
        message = rf"the plugin library .*{library.name} does not load: .*{reason}.*\n  gsx plugins build"
        with pytest.raises(EngineError, match=message):
            build_small(bundle, plugins=library)
        assert not (bundle / ENGINES).exists()


def test_a_plugin_library_of_others_and_half_of_one(bundle: Path, tmp_path: Path) -> None:
    needs_plugins()
    named = find_library()
    assert named is not None
    content = named.read_bytes()
    renamed = tmp_path / "librenamed.so"
    renamed.write_bytes(content.replace(b"TopKGather\0", b"TopKOthers\0"))
    half = tmp_path / "libhalf.so"
    half.write_bytes(content[: len(content) // 2])
    for library, message in (
        (renamed, r"it has no plugin for TopKGather: it is from another version of gsx"),
        (half, r"(?s)loading the plugin library|does not load"),
    ):
        with pytest.raises(EngineError, match=message):
            build_small(bundle, plugins=library)
        assert not (bundle / ENGINES).exists()


def onnxruntime_library() -> str:
    """A shared library that is installed wherever these tests run."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    return str(onnxruntime_pybind11_state.__file__)


def test_a_tensorrt_without_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsx_engines.building.build.cuda.device", lambda: object())
    for version, taken in (("10.14.1.48", False), ("9.3", False), ("10.15.0", True), ("11.1.0.106", True)):
        module = SimpleNamespace(__version__=version)
        monkeypatch.setattr("gsx_engines.building.build.load_module", lambda _, module=module: module)
        if taken:
            assert check_backend("tensorrt") is module
        else:
            with pytest.raises(EngineError, match=rf"lacks ops .*\n  expected TensorRT 10.15 .*, found {version}"):
                check_backend("tensorrt")


def test_a_library_without_code_for_a_target(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requested one is refused, others are left out; a bundle without plugins does not ask."""
    needs_plugins()
    monkeypatch.setattr(building, "run_job", lambda *args: pytest.fail("a build was begun"))
    record = BuildRecord("0", ("80-real", "89-real"), "13.0", "11.1", 1.0)
    monkeypatch.setattr(plugin_targets, "record_of", lambda library: record)
    with pytest.raises(
        EngineError, match=r"(?s)has no code for compute capability 12\.0\n.*found one for 80-real, 89-real"
    ):
        build(bundle, targets=["8.9", "12.0"])
    library = find_library()
    assert plugin_targets.with_kernels(library, [], ("80", "86", "89", "120")) == ("80", "86", "89")
    assert plugin_targets.with_kernels(None, ["12.0"], ("120",)) == ("120",)
