"""Finding the tools, reporting what is missing, and caching what was built. The build itself is `plugin_library`."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gsx.cli import run
from gsx_plugins import build as building
from gsx_plugins import library
from gsx_plugins.build import ARCHITECTURES, build, find_headers, find_nvcc, find_toolchain
from gsx_plugins.errors import GsxError, PluginLibraryError
from gsx_plugins.library import (
    PLUGIN_OPS,
    SOURCE_FOLDER,
    BuildRecord,
    find_kernels,
    find_library,
    library_hash,
    record_of,
    source_hash,
)
from gsx_plugins.progress import Progress


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing on it; returns its PATH folder."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "TENSORRT_ROOT", "GSX_PLUGIN_LIBRARY"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_NVCC_PLACES", ())
    monkeypatch.setattr(building, "_HEADER_PLACES", ())
    return programs


def program(folder: Path, name: str, answer: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def working(bare: Path) -> Path:
    """All tools in accepted versions, which do nothing."""
    program(bare, "nvcc", "release 13.0\n" + "\n".join(f"compute_{number}" for number in (75, 80, 86, 89, 90, 120)))
    program(bare, "c++", "")
    program(bare, "cmake", "cmake version 3.30.0")
    return bare


def cmake(folder: Path, work: str) -> None:
    """A CMake that does this when it is called to configure or build."""
    path = folder / "cmake"
    path.write_text(f'#!/bin/sh\ncase "$1" in --version) echo "cmake version 3.30.0";; *) {work};; esac\n')
    path.chmod(0o755)


def headers(folder: Path, major: int, minor: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    text = (
        f"#define TRT_MAJOR_ENTERPRISE {major}\n#define TRT_MINOR_ENTERPRISE {minor}\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major\n"
    )
    (folder / "NvInferVersion.h").write_text(text)
    return folder


def test_all_faults_are_in_one_message(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(headers(tmp_path / "trt" / "include", 9, 3).parent))
    with pytest.raises(
        PluginLibraryError, match=r"no nvcc.*; no cmake.*\(expected 10\.8 or later, before 12\.0, found 9\.3\)"
    ):
        find_toolchain()


def test_everything_is_missing(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message names everything that is missing, and how to get it."""
    assert run(["plugins", "build"]) == 1
    text = capsys.readouterr().err
    for part in (
        "no nvcc",
        "no cmake",
        "no C++ compiler",
        "no TensorRT headers",
        "CUDA toolkit",
        "TENSORRT_ROOT",
        "pip",
    ):
        assert part in text
    with pytest.raises(PluginLibraryError) as caught:
        find_toolchain(kernels_only=True)
    assert "headers" not in str(caught.value)


def test_nvcc_too_old(bare: Path) -> None:
    program(bare, "nvcc", "Cuda compilation tools, release 12.4, V12.4.99")
    with pytest.raises(PluginLibraryError, match=r"(?s)is too old.*expected CUDA 12\.8 or later, found 12\.4"):
        find_nvcc()
    program(bare, "nvcc", "Cuda compilation tools, release 12.8, V12.8.61")
    assert find_nvcc() == (bare / "nvcc", (12, 8))


def test_nvcc_where_the_variables_say(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    named = program(home / "bin", "nvcc", "release 13.0")
    program(bare, "nvcc", "release 12.9")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert find_nvcc()[0] == named


@pytest.mark.parametrize(("version", "fits"), [((10, 7), False), ((10, 8), True), ((11, 5), True), ((12, 0), False)])
def test_header_versions(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], fits: bool
) -> None:
    folder = headers(tmp_path / "trt" / "include", *version)
    monkeypatch.setenv("TENSORRT_ROOT", str(folder.parent))
    if fits:
        assert find_headers() == building.Headers(folder, version)
    else:
        with pytest.raises(PluginLibraryError, match=r"10\.8 or later, before 12\.0"):
            find_headers()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("sm_90", "there is no CUDA architecture 'sm_90'"),
        ("75", "do not run on CUDA architecture 75\n  expected 80 or later, found 75"),
        ("99-real", "does not know CUDA architecture 99-real\n  expected 80, 86, 89, 90, 120, found 99"),
    ],
)
def test_no_such_architecture(
    working: Path, capsys: pytest.CaptureFixture[str], architecture: str, message: str
) -> None:
    assert run(["plugins", "build", "--kernels-only", "--arch", f"80,{architecture}"]) == 2
    assert message in capsys.readouterr().err
    assert find_kernels() is None


def test_no_place_for_the_library(working: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_ROOM_BYTES", 1 << 60)
    with pytest.raises(GsxError, match=r"(?s)not enough room on the disk.*XDG_CACHE_HOME"):
        build(kernels_only=True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GsxError, match=r"(?s)could not be written.*XDG_CACHE_HOME"):
        build(kernels_only=True)


def wait_for_the_end_of(process: int) -> None:
    """Wait for the end of a process that is not our child; a zombie does not count as running."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {process} is still there")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux, as the library does")
def test_an_interrupted_build_takes_its_compilers_along(working: Path, tmp_path: Path) -> None:
    """CMake, when it is ended, does not end what it started."""
    started = tmp_path / "compiler"
    cmake(working, f"/bin/sleep 60 & echo $! > {started}; echo configuring; wait")

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(kernels_only=True, on_progress=interrupt)
    wait_for_the_end_of(int(started.read_text()))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_failed_build_leaves_nothing(working: Path, tmp_path: Path) -> None:
    """The compiler's own messages are shown, and no library or part of one is left."""
    cmake(working, 'echo "fatal error: x.h"; exit 2')
    with pytest.raises(PluginLibraryError, match=r"(?s)building the plugins failed.*fatal error: x\.h"):
        build(kernels_only=True)
    assert find_kernels() is None
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_source_hash_sees_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.relative_to(SOURCE_FOLDER).as_posix() for path in library.native_sources()}
    assert {"CMakeLists.txt", "native/plugin.cpp", "topk_gather/kernel.cu", "native/compact.cuh"} <= names
    copy = tmp_path / "plugins"
    shutil.copytree(SOURCE_FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(library, "SOURCE_FOLDER", copy)
    assert source_hash.__wrapped__() == source_hash()
    with (copy / "native" / "rows.cuh").open("a") as file:
        file.write("\n")
    assert source_hash.__wrapped__() != source_hash()


def test_named_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GSX_PLUGIN_LIBRARY", str(tmp_path / "mine.so"))
    with pytest.raises(PluginLibraryError, match="GSX_PLUGIN_LIBRARY names a file that does not exist"):
        find_library()
    (tmp_path / "mine.so").write_bytes(b"content")
    assert find_library() == tmp_path / "mine.so"
    assert record_of(tmp_path / "mine.so") is None


def test_built_library(plugin_library: Path) -> None:
    """Every architecture, warnings as errors; cached by the sources' hash; nothing of TensorRT or CUDA is linked."""
    built = build()
    assert built.cached
    assert built.path == plugin_library
    assert set(ARCHITECTURES) <= set(built.record.architectures)
    assert built.record.source_hash == source_hash()
    assert len(library_hash(plugin_library)) == 64
    exported = ctypes.CDLL(str(plugin_library))
    for name in ("getCreators", "setLoggerFinder", "gsx_topk_select", "gsx_gather_rows", "gsx_error_string"):
        assert hasattr(exported, name)
    readelf = shutil.which("readelf")
    if readelf is not None:
        text = subprocess.run([readelf, "-d", plugin_library], capture_output=True, text=True, check=True).stdout
        assert "libnvinfer" not in text
        assert "libtensorrt" not in text
        assert "libcudart" not in text


def test_plugins_list(
    plugin_library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GSX_PLUGIN_LIBRARY", str(plugin_library))
    assert run(["plugins", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {op["name"] for op in found["ops"] if op["native"]} == set(PLUGIN_OPS)
    assert found["library"]["sha256"] == library_hash(plugin_library)
    assert found["library"]["plugins"] is True
    assert run(["plugins", "list"]) == 0
    assert library_hash(plugin_library) in capsys.readouterr().out


def test_a_file_that_is_not_a_library(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.so").write_bytes(b"content")
    monkeypatch.setenv("GSX_PLUGIN_LIBRARY", str(tmp_path / "mine.so"))
    assert run(["plugins", "list"]) == 1
    assert "mine.so: is not the library of gsx's kernels and plugins" in capsys.readouterr().err


def test_nothing_is_built(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "list"]) == 0
    assert "not built: gsx plugins build" in capsys.readouterr().out


ROOTS = [
    Path(root) for root in os.environ.get("GSX_TEST_TENSORRT_ROOTS", os.environ.get("TENSORRT_ROOT", "")).split(":")
]


@pytest.mark.parametrize("root", ROOTS, ids=str)
@pytest.mark.parametrize("source", sorted(SOURCE_FOLDER.glob("*/plugin.cpp")), ids=lambda path: path.parent.name)
def test_adapters_compile_without_warnings(root: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every set of TensorRT headers that GSX_TEST_TENSORRT_ROOTS names, folders separated by colons."""
    from tests.plugins.emulation import cuda_include

    compiler, cuda = shutil.which("g++"), cuda_include()
    if root == Path() or compiler is None or cuda is None:
        pytest.skip("needs g++, CUDA's headers and TENSORRT_ROOT (or GSX_TEST_TENSORRT_ROOTS)")
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{SOURCE_FOLDER}"]
    command += ["-isystem", str(find_headers().folder), "-isystem", str(cuda), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("architectures", "there", "missing"),
    [
        (("80-real", "86-real"), ("80", "86", "89"), ("75", "90", "120")),
        (("86-real",), ("86", "89"), ("80", "90")),
        (("90",), ("90", "100", "120"), ("89",)),
        (("90-virtual",), ("90", "120"), ("89",)),
        (("90a-real",), ("90",), ("89", "100")),
        (("120f",), ("120", "121"), ("90", "130")),
    ],
)
def test_gpus_that_have_code(architectures: tuple[str, ...], there: Sequence[str], missing: Sequence[str]) -> None:
    record = BuildRecord("0", architectures, "13.0", None, 1.0)
    assert all(record.runs_on(one) for one in there)
    assert not any(record.runs_on(one) for one in missing)
