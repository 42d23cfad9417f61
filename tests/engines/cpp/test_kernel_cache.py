"""TensorRT-RTX's kernels across runs: C++ keeps them in Python's files, and its calls are those of the headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gsx_engines.tensorrt.kernel_cache import kernel_cache_path
from tests.engines.cpp.conftest import NEEDS, ROOTS, SOURCES
from tests.engines.cpp.test_package import compile_device_sources

SHA256 = "ab" * 32
# TensorRT-RTX's own headers come only with its SDK. They have these declarations besides those of TensorRT 11's, which
# its samples use (https://github.com/NVIDIA/TensorRT-RTX, samples/apiUsage/cpp/apiUsage.cpp).
CACHE = """
enum class CudaGraphStrategy : int32_t
{
    kDISABLED = 0,
    kWHOLE_GRAPH_CAPTURE = 1,
};
class IRuntimeCache : public INoCopy
{
public:
    virtual ~IRuntimeCache() noexcept = default;
    bool deserialize(void const* blob, size_t size) noexcept;
    IHostMemory* serialize() const noexcept;
};
"""
CONFIG = """
    IRuntimeCache* createRuntimeCache() const noexcept;
    bool setRuntimeCache(IRuntimeCache const& cache) noexcept;
    bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept;
"""


class Program:
    """A program that keeps kernels in a cache folder of its own."""

    def __init__(self, build: Path) -> None:
        self.path = kernel_cache_path(SHA256, "89")
        self._program = build / "tests/gsx_check_kernel_cache"

    def run(self, compiled: str, fitting: str = "kernels") -> str:
        """One run that compiles something; returns what it took from the file."""
        command = [str(self._program), SHA256, "89", fitting, compiled]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        path, known = done.stdout.split("\n", 1)
        assert path == str(self.path)
        return known[:-1]


@pytest.fixture
def program(cpp_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Program(cpp_build)


def test_the_next_run_has_what_this_one_compiled(program: Program) -> None:
    assert program.run("kernels of a first run") == ""
    assert program.run(" and a second") == "kernels of a first run"
    assert program.path.read_text() == "kernels of a first run and a second"
    assert [one.name for one in program.path.parent.iterdir()] == [program.path.name]


@pytest.mark.parametrize("content", ["", "of another driver"])
def test_what_does_not_fit_is_written_anew(program: Program, content: str) -> None:
    program.path.parent.mkdir(parents=True)
    program.path.write_text(content)
    assert program.run("kernels") == ""
    assert program.path.read_text() == "kernels"


def test_nothing_new_is_not_written(program: Program) -> None:
    program.run("kernels")
    program.path.chmod(0o400)
    before = program.path.stat()
    assert program.run("") == "kernels"
    assert (program.path.stat().st_ino, program.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_full_disk_is_not_a_failure(program: Program) -> None:
    program.path.parent.parent.mkdir(parents=True)
    program.path.parent.write_text("a file where the folder should be")
    assert program.run("kernels") == ""


def test_calls_of_tensorrt_rtx(tmp_path: Path) -> None:
    """The code that is compiled only with TensorRT-RTX's headers compiles without warnings."""
    root = next((root for root in ROOTS if root.name.startswith("11")), None)
    if root is None:
        pytest.skip(NEEDS)
    shutil.copytree(root / "include", tmp_path / "include")
    header = tmp_path / "include" / "NvInferRuntime.h"
    text = header.read_text()
    config, begin = "//! \\class IRuntimeConfig\n", "    virtual ~IRuntimeConfig() noexcept = 0;\n"
    assert text.count(config) == text.count(begin) == 1
    header.write_text(text.replace(config, CACHE + config).replace(begin, begin + CONFIG))
    version = tmp_path / "include" / "NvInferVersion.h"
    version.write_text(version.read_text() + "\n#define TRT_MAJOR_RTX 1\n")
    assert "TRT_MAJOR_RTX" in (SOURCES / "src/tensorrt/execution.cpp").read_text()
    compile_device_sources(tmp_path, backend="tensorrt-rtx")


def test_a_relative_cache_folder_is_ignored(cpp_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    program = Program(cpp_build)
    program.run("kernels")
    assert program.path.is_relative_to(tmp_path / ".cache" / "gsx")
    assert program.path.read_text() == "kernels"
