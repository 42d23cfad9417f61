"""Builds the C++ runtime, once per state of its sources."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gsx_engines.bundle.schema import SCHEMA_FILE
from gsx_plugins.files import cache_folder
from tests.engines.cpp.toy_bundles import BACKEND, version_of, write_bundle
from tests.plugins.emulation import cuda_include
from tests.vectors import make

SOURCES = Path(__file__).parents[3] / "engines" / "cpp"
# Folders of TensorRT; only their headers are needed.
ROOTS = [
    Path(root) for root in os.environ.get("GSX_TEST_TENSORRT_ROOTS", os.environ.get("TENSORRT_ROOT", "")).split(":")
]
NEEDS = "needs g++, CUDA's headers and TENSORRT_ROOT (or GSX_TEST_TENSORRT_ROOTS)"


def headers_of(root: Path) -> Path | None:
    """Folder of TensorRT's headers, given that folder or the one above it; None if it has no headers."""
    return next((folder for folder in (root / "include", root) if (folder / "NvInferRuntime.h").is_file()), None)


def json_include() -> Path | None:
    """Folder of nlohmann/json.hpp: the system's, or of the package `nlohmann-json`."""
    package = find_spec("nlohmann_json")
    places = [Path(place) / "include" for place in (package.submodule_search_locations if package else None) or ()]
    return next((place for place in (Path("/usr/include"), *places) if (place / "nlohmann/json.hpp").is_file()), None)


def configure(build: Path, *options: str) -> None:
    """Run CMake on the sources; skips if a tool is missing."""
    cmake, compiler, include = shutil.which("cmake"), shutil.which("c++"), json_include()
    if cmake is None or compiler is None:
        pytest.skip("the C++ runtime needs CMake 3.24 and a C++17 compiler: pip install cmake, install g++")
    if include is None:
        pytest.skip("the C++ runtime needs nlohmann/json.hpp: pip install nlohmann-json")
    command = [cmake, "-S", str(SOURCES), "-B", str(build), f"-DGSX_JSON_INCLUDE={include}", *options]
    run([*command, "-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles"])


def compile_all(build: Path, target: str = "all") -> None:
    """Build what was configured."""
    run(["cmake", "--build", str(build), "--parallel", "2", "--target", target])


def run(command: list[str], **options: object) -> str:
    """Run a command, which must succeed. Returns: what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return str(done.stdout)


def onnxruntime_options() -> list[str]:
    """CMake's options for the CPU: ONNX Runtime's headers where ONNXRUNTIME_ROOT says or the system has them, and the
    library of the Python package; empty if there are no headers."""
    places = [Path(place) for place in (os.environ.get("ONNXRUNTIME_ROOT", ""), "/usr") if place]
    folders = [place / folder for place in places for folder in ("include", "include/onnxruntime")]
    headers = next((folder for folder in folders if (folder / "onnxruntime_c_api.h").is_file()), None)
    wheel = find_spec("onnxruntime")
    package = [Path(place) for place in (wheel.submodule_search_locations if wheel else None) or ()]
    library = next((path for place in package for path in (place / "capi").glob("libonnxruntime.so.*")), None)
    if headers is None or library is None:
        return []
    # The loader asks for the name without the minor version, which the wheel does not have.
    link = cache_folder() / "cpp-tests" / library.name / "libonnxruntime.so.1"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    library = link
    return ["-DGSX_ONNXRUNTIME=ON", f"-DGSX_ONNXRUNTIME_INCLUDE={headers}", f"-DGSX_ONNXRUNTIME_LIBRARY={library}"]


@pytest.fixture(scope="session")
def cpu_build(cpp_build: Path) -> Path:
    """The build with ONNX Runtime; skips if its headers are not installed."""
    if not onnxruntime_options():
        pytest.skip("the C++ runtime on a CPU needs ONNX Runtime's headers: set ONNXRUNTIME_ROOT to a release")
    return cpp_build


def text_options() -> list[str]:
    """Where PyTorch's tokenizers and minja are (docs/cpp.md); empty if that is not said."""
    return os.environ.get("GSX_TEST_CPP_TEXT", "").split()


@pytest.fixture(scope="session")
def cpp_build() -> Path:
    """The core and its tests, compiled without warnings; other CXXFLAGS (e.g. sanitizers) make a separate build."""
    # CMake ties a build to the folder of its sources: two checkouts have two.
    text = text_options()
    options = [*_standin_options(), *onnxruntime_options(), *(["-DGSX_TEXT=ON", *text] if text else [])]
    digest = hashlib.sha256("\0".join([str(SOURCES), os.environ.get("CXXFLAGS", ""), *options]).encode())
    for path in [*sorted(SOURCES.rglob("*")), SCHEMA_FILE]:
        if path.is_file():
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    build = cache_folder() / "cpp-tests" / digest.hexdigest()[:16]
    # Optimizing tests gains little, and not optimizing them saves much time.
    configure(build, "-DGSX_BACKEND=none", "-DGSX_TESTS=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", *options)
    compile_all(build)
    return build


@pytest.fixture(scope="session")
def standin_build(cpp_build: Path) -> Path:
    """The device part on the stand-in for TensorRT and CUDA; skips if their headers are not installed."""
    if not _standin_options():
        pytest.skip(NEEDS)
    compile_all(cpp_build, "gsx_standin")
    return cpp_build / "tests/standin"


@dataclass(frozen=True)
class StandIn:
    """The stand-in for one version of TensorRT, and the models of the vectors as bundles for it."""

    build: Path
    number: int
    version: str
    vectors: Path

    @property
    def manifests(self) -> dict[str, Any]:
        return dict(json.loads(self.vectors.read_text(encoding="utf-8"))["manifests"])

    @property
    def cases(self) -> list[dict[str, Any]]:
        return list(json.loads(self.vectors.read_text(encoding="utf-8"))["cases"])

    def check(self, *words: str | Path) -> tuple[int, str]:
        """Exit code and output of its program."""
        program = self.build / f"gsx_standin_{self.number}"
        done = subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=300)
        return done.returncode, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="session")
def stand_ins(standin_build: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StandIn]:
    """Of every set of headers."""
    made = []
    for number, headers in enumerate(filter(None, map(headers_of, ROOTS))):
        folder, version = tmp_path_factory.mktemp("bundles"), version_of(headers)
        # What Python makes, as test_vectors checks.
        text = (make.FOLDER / "generation.json").read_text(encoding="utf-8").replace("tensorrt-rtx", BACKEND)
        (folder / "generation.json").write_text(text, encoding="utf-8")
        for name, manifest in json.loads(text)["manifests"].items():
            write_bundle(folder / name, manifest, version)
        made.append(StandIn(standin_build, number, version, folder / "generation.json"))
    return made


@pytest.fixture
def stand_in(stand_ins: list[StandIn]) -> StandIn:
    """Of the first headers."""
    return stand_ins[0]


def _standin_options() -> list[str]:
    """CMake's options for the stand-in; empty if there are no headers."""
    headers, cuda_headers = [str(folder) for root in ROOTS if (folder := headers_of(root))], cuda_include()
    if not headers or cuda_headers is None:
        return []
    return [f"-DGSX_STANDIN_HEADERS={';'.join(headers)}", f"-DGSX_STANDIN_CUDA={cuda_headers}"]
