"""Builds the C++ runtime, once per state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import engines
from engines.bundle.schema import SCHEMA_FILE
from plugins.library import cache_folder

SOURCES = Path(engines.__file__).parent / "cpp"


def json_include() -> Path | None:
    """Folder of nlohmann/json.hpp: the system's, or of the package `nlohmann-json`."""
    package = find_spec("nlohmann_json")
    places = [Path(place) / "include" for place in (package.submodule_search_locations if package else None) or ()]
    return next((place for place in (Path("/usr/include"), *places) if (place / "nlohmann/json.hpp").is_file()), None)


def configure(build: Path, *options: str) -> None:
    """Run CMake on the sources; skips where a tool is missing."""
    cmake, compiler, include = shutil.which("cmake"), shutil.which("c++"), json_include()
    if cmake is None or compiler is None:
        pytest.skip("the C++ runtime needs CMake 3.24 and a C++17 compiler: pip install cmake, install g++")
    if include is None:
        pytest.skip("the C++ runtime needs nlohmann/json.hpp: pip install nlohmann-json")
    command = [cmake, "-S", str(SOURCES), "-B", str(build), f"-DGSX_JSON_INCLUDE={include}", *options]
    run([*command, "-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles"])


def compile_all(build: Path) -> None:
    """Build what was configured."""
    run(["cmake", "--build", str(build), "--parallel", "2"])


def run(command: list[str], **options: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return str(done.stdout)


@pytest.fixture(scope="session")
def cpp_build() -> Path:
    """The core and its tests, compiled without warnings; CXXFLAGS (sanitizers, say) make a build of their own."""
    # CMake ties a build to the folder of its sources: two checkouts have two.
    digest = hashlib.sha256(f"{SOURCES}\0{os.environ.get('CXXFLAGS', '')}".encode())
    for path in [*sorted(SOURCES.rglob("*")), SCHEMA_FILE]:
        if path.is_file():
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    build = cache_folder() / "cpp-tests" / digest.hexdigest()[:16]
    # Little is gained by optimizing tests, and much time by not doing it.
    configure(build, "-DGSX_BACKEND=none", "-DGSX_TESTS=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    compile_all(build)
    return build
