"""The installed package, and what the library says where there is no GPU."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.tensorrt import cuda
from tests.engines.cpp.conftest import (
    NEEDS,
    ROOTS,
    SOURCES,
    compile_all,
    configure,
    headers_of,
    json_include,
    run,
    text_options,
)
from tests.plugins.emulation import cuda_include

CONSUMER = {
    "CMakeLists.txt": """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
find_package(gsx 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE gsx::core)
""",
    "main.cpp": """
#include <gsx/gsx.h>

#include <iostream>

int main(int, char** arguments) {
    gsx::Bundle const bundle = gsx::openBundle(arguments[1]);
    std::cout << bundle.manifest.decoder.vocabSize << " " << bundle.manifest.selection->budget << std::endl;
}
""",
}


def test_another_project_finds_it(cpp_build: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Installed, `find_package(gsx)`, and a program that opens a bundle."""
    prefix, build = tmp_path / "prefix", tmp_path / "build"
    run(["cmake", "--install", str(cpp_build), "--prefix", str(prefix)])
    for name, text in CONSUMER.items():
        (tmp_path / name).write_text(text)
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-O0", *text_options()]
    run(["cmake", "-S", str(tmp_path), "-B", str(build), *options])
    compile_all(build)
    vocabulary = open_bundle(tiny_bundle).manifest.decoder.vocab_size
    assert run([str(build / "consumer"), str(tiny_bundle)]) == f"{vocabulary} 0.7\n"


@pytest.mark.parametrize("root", ROOTS, ids=str)
def test_tensorrt_headers(root: Path) -> None:
    """The device part compiles without warnings against every set of headers that is named."""
    compile_device_sources(root)


def compile_device_sources(root: Path, backend: str = "tensorrt") -> None:
    """Compile the sources that need TensorRT's headers, without warnings; skips if a tool is missing.

    Args: root: folder of the headers, or of their `include`.
    """
    compiler, headers, cuda_headers, json = shutil.which("g++"), headers_of(root), cuda_include(), json_include()
    if compiler is None or headers is None or cuda_headers is None or json is None:
        pytest.skip(NEEDS)
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
    command += [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'src'}", f'-DGSX_BACKEND="{backend}"']
    command += ["-DGSX_HAS_TENSORRT=1", "-DGSX_HAS_ONNXRUNTIME=0", "-DGSX_HAS_TEXT=0"]
    for folder in (headers, cuda_headers, json):
        command += ["-isystem", str(folder)]
    for source in [*sorted((SOURCES / "src/tensorrt").glob("*.cpp")), *sorted((SOURCES / "apps").glob("*.cpp"))]:
        run([*command, str(source)])


@pytest.fixture(scope="module")
def gsx_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gsx-run` of TensorRT-RTX, linked to the wheel's library."""
    wheel = find_spec("tensorrt_rtx_libs")
    roots = [root for root in ROOTS if root.name.startswith("11")]
    if wheel is None or not roots or cuda_include() is None:
        pytest.skip("needs tensorrt-rtx, CUDA's headers and TensorRT 11's in GSX_TEST_TENSORRT_ROOTS")
    library = Path(next(iter(wheel.submodule_search_locations or ()))) / "libtensorrt_rtx.so.1"
    build = tmp_path_factory.mktemp("rtx")
    options = ["-DGSX_BACKEND=tensorrt-rtx", f"-DTENSORRT_ROOT={roots[0]}", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    configure(build, *options, f"-DGSX_TENSORRT_LIBRARY={library}")
    compile_all(build)
    return build / "gsx-run"


@pytest.mark.skipif(cuda.device() is not None, reason="there is a GPU here")
def test_gsx_run_without_a_gpu(gsx_run: Path, tiny_bundle: Path) -> None:
    """Every error is a message and an exit code; nothing crashes."""
    rows = {
        (): (2, "no bundle was named"),
        ("--nothing",): (2, "'--nothing' is not an option"),
        (str(tiny_bundle), "--top-k"): (2, "expected a value, found none"),
        (str(tiny_bundle), "--top-k", "many"): (2, "expected a whole number, found 'many'"),
        ("nowhere",): (1, "nowhere: is not a bundle"),
        (str(tiny_bundle),): (1, "has no engines for tensorrt-rtx"),
    }
    for arguments, (code, says) in rows.items():
        done = subprocess.run([gsx_run, *arguments], input="1 2", capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert says in done.stderr
