"""Building the native library: find the tools, run CMake, and store the result by the hash of its sources.

Only TensorRT's headers are needed. TensorRT is not linked, so the same library loads into TensorRT 10.8 to 11 and
TensorRT-RTX. Without the headers, only the kernels can be built (`kernels_only`), for PyTorch.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gsx_plugins.errors import PluginLibraryError, UsageError
from gsx_plugins.files import check_room, disk_error
from gsx_plugins.library import (
    KERNEL_LIBRARY_NAME,
    PLUGIN_LIBRARY_NAME,
    SOURCE_FOLDER,
    BuildRecord,
    library_folder,
    record_of,
    source_hash,
    write_record,
)
from gsx_plugins.progress import OnProgress, Progress, silent

# Machine code for these, and PTX of 9.0 and of the newest one for later GPUs.
ARCHITECTURES = ("80-real", "86-real", "89-real", "90", "120")
MIN_NVCC = (12, 8)  # the first version that supports sm_120
MIN_CMAKE = (3, 24)
MIN_HEADERS, NEXT_HEADERS = (10, 8), (12, 0)
HEADERS_VARIABLE = "TENSORRT_ROOT"

_ARCHITECTURE = re.compile(r"(\d{2,3})[af]?(-real|-virtual)?")
_MIN_ARCHITECTURE = 80  # the first with bfloat16 and the warp reductions that the kernels use
_NVCC_ARCHITECTURE = re.compile(r"^compute_(\d+)", re.MULTILINE)
_NVCC_PLACES = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")
_HEADER_PLACES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
    "/opt/tensorrt/include",
)
_GET_NVCC = "install the CUDA toolkit, 12.8 or later, and put nvcc on the PATH or set CUDA_HOME"
_GET_CMAKE = "pip install cmake"
_GET_COMPILER = "install g++ or clang++"
_GET_HEADERS = (
    f"set {HEADERS_VARIABLE} to a TensorRT folder; the headers are enough: "
    "git clone --depth 1 --branch v11.1 https://github.com/NVIDIA/TensorRT"
)
# Far more than a build needs for its result (6 MB) and its temporary files.
_ROOM_BYTES = 64 << 20
_LOG_LINES = 12
_STEP = re.compile(r"^\[\s*(\d+)/(\d+)\]\s*(.*)|^\[\s*(\d+)%\]\s*(.*)")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Headers:
    """TensorRT's headers: the folder with `NvInferRuntime.h`, and their version, e.g. (11, 1)."""

    folder: Path
    version: tuple[int, int]


@dataclass(frozen=True)
class Toolchain:
    """The tools of a build. `headers` is None for a build of only the kernels."""

    nvcc: Path
    nvcc_version: tuple[int, int]
    cmake: Path
    compiler: Path
    headers: Headers | None


@dataclass(frozen=True)
class Built:
    """A library, how it was built, and whether it already existed."""

    path: Path
    record: BuildRecord
    cached: bool


def build(
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    kernels_only: bool = False,
    force: bool = False,
    jobs: int | None = None,
    on_progress: OnProgress = silent,
) -> Built:
    """Build the library, unless one of these sources and architectures exists already.

    Args:
        architectures: in CMake's spelling: `90` (machine code and PTX), `90-real`, `90-virtual`.
        kernels_only: without the TensorRT plugins, and so without TensorRT's headers.
        force: build even if it exists.
        jobs: number of compilers that run at a time; None for one per processor.
        on_progress: called with a stage, the steps done, and all steps (0: unknown).
    Raises:
        UsageError: an unknown architecture, or one that the kernels or this nvcc do not support.
        PluginLibraryError: a tool is missing or too old, or the build fails.
        GsxError: there is no room for the library.
    """
    numbers = [_number_of(name) for name in architectures]
    folder = library_folder()
    path = folder / (KERNEL_LIBRARY_NAME if kernels_only else PLUGIN_LIBRARY_NAME)
    record = record_of(path) if path.is_file() else None
    if record is not None and not force and set(architectures) <= set(record.architectures):
        return Built(path, record, cached=True)
    tools = find_toolchain(kernels_only=kernels_only)
    _check_architectures(tools, architectures, numbers)
    started = time.monotonic()
    with _work_folder(folder) as work:
        made = _run_cmake(tools, work, architectures, jobs, on_progress) / path.name
        record = BuildRecord(
            source_hash=source_hash(),
            architectures=tuple(architectures),
            nvcc=_spell(tools.nvcc_version),
            tensorrt_headers=_spell(tools.headers.version) if tools.headers else None,
            seconds=round(time.monotonic() - started, 1),
        )
        os.replace(made, path)
        write_record(path, record)
    return Built(path, record, cached=False)


def _number_of(architecture: str) -> int:
    """Compute capability of an architecture in CMake's spelling, e.g. 89 for `89-real`."""
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        raise UsageError(
            f"there is no CUDA architecture {architecture!r}",
            expected="a compute capability without its dot, e.g. 90 or 89-real",
            todo=f"the default is {','.join(ARCHITECTURES)}",
        )
    number = int(match[1])
    if number < _MIN_ARCHITECTURE:
        raise UsageError(
            f"the kernels do not run on CUDA architecture {architecture}",
            expected=f"{_MIN_ARCHITECTURE} or later",
            found=str(number),
            todo=f"the default is {','.join(ARCHITECTURES)}",
        )
    return number


def _check_architectures(tools: Toolchain, architectures: Sequence[str], numbers: Sequence[int]) -> None:
    """Refuse architectures that this nvcc does not know; otherwise the build would fail half-way."""
    known = [int(number) for number in _NVCC_ARCHITECTURE.findall(_answer_of(tools.nvcc, "--list-gpu-arch", _GET_NVCC))]
    for name, number in zip(architectures, numbers, strict=True):
        if known and number not in known:
            raise UsageError(
                f"{tools.nvcc} does not know CUDA architecture {name}",
                expected=", ".join(str(one) for one in sorted(known) if one >= _MIN_ARCHITECTURE),
                found=str(number),
                todo="another version of the CUDA toolkit may know it",
            )


@contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    """A temporary folder to build in, inside the folder of the library.

    Raises:
        GsxError: it cannot be created, or the library cannot be written.
    """
    todo = "free some space, or set XDG_CACHE_HOME to a folder that can be written"
    try:
        home.mkdir(parents=True, exist_ok=True)
        check_room(home, _ROOM_BYTES, todo=todo)
        # An interrupted compiler may still write a file while the folder is being removed, which is no reason to fail.
        with tempfile.TemporaryDirectory(prefix="build-", dir=home, ignore_cleanup_errors=True) as work:
            yield Path(work)
    except OSError as error:
        raise disk_error(home, error, todo=todo) from error


def find_toolchain(*, kernels_only: bool = False) -> Toolchain:
    """Find the tools of a build.

    Raises:
        PluginLibraryError: names everything that is missing, and how to get it.
    """
    faults: list[PluginLibraryError] = []

    def attempt(find: Callable[[], _T]) -> _T | None:
        try:
            return find()
        except PluginLibraryError as error:
            faults.append(error)
            return None

    nvcc, cmake, compiler = attempt(find_nvcc), attempt(find_cmake), attempt(_find_compiler)
    headers = None if kernels_only else attempt(find_headers)
    if faults or nvcc is None or cmake is None or compiler is None:
        if len(faults) == 1:
            raise faults[0]
        raise PluginLibraryError(
            "cannot build the plugins: " + "; ".join(_in_one_line(fault) for fault in faults),
            todo="\n  ".join(fault.todo for fault in faults if fault.todo),
        )
    return Toolchain(nvcc[0], nvcc[1], cmake[0], compiler, headers)


def _in_one_line(fault: PluginLibraryError) -> str:
    facts = [f"{word} {fact}" for word, fact in (("expected", fault.expected), ("found", fault.found)) if fact]
    return fault.what + (f" ({', '.join(facts)})" if facts else "")


def find_nvcc() -> tuple[Path, tuple[int, int]]:
    """The CUDA compiler and its version, from `CUDACXX`, `CUDA_HOME`, `CUDA_PATH`, the PATH, or the usual places."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), shutil.which("nvcc")]
    for candidate in (*candidates, *_NVCC_PLACES):
        if candidate and Path(candidate).is_file():
            version = _version_of(Path(candidate), r"release (\d+)\.(\d+)", _GET_NVCC)
            if version < MIN_NVCC:
                raise PluginLibraryError(
                    f"{candidate} is too old",
                    expected=f"CUDA {_spell(MIN_NVCC)} or later",
                    found=_spell(version),
                    todo=_GET_NVCC,
                )
            return Path(candidate), version
    raise PluginLibraryError("no nvcc (the CUDA compiler) was found", todo=_GET_NVCC)


def find_headers() -> Headers:
    """TensorRT's headers: under `TENSORRT_ROOT` if it is set, else in the usual places."""
    root = os.environ.get(HEADERS_VARIABLE)
    places = [Path(root) / "include", Path(root)] if root else [Path(place) for place in _HEADER_PLACES]
    for place in places:
        if (place / "NvInferRuntime.h").is_file() and (place / "NvInferVersion.h").is_file():
            version = _header_version(place / "NvInferVersion.h")
            if not MIN_HEADERS <= version < NEXT_HEADERS:
                raise PluginLibraryError(
                    f"the TensorRT headers in {place} have a version that the plugins do not support",
                    expected=f"{_spell(MIN_HEADERS)} or later, before {_spell(NEXT_HEADERS)}",
                    found=_spell(version),
                    todo=_GET_HEADERS,
                )
            return Headers(place, version)
    where = f"{HEADERS_VARIABLE}={root}" if root else "the usual places"
    raise PluginLibraryError(f"no TensorRT headers (NvInferRuntime.h) in {where}", todo=_GET_HEADERS)


def find_cmake() -> tuple[Path, tuple[int, int]]:
    """CMake and its version.

    Raises:
        PluginLibraryError: it is missing or too old.
    """
    found = shutil.which("cmake")
    if found is None:
        raise PluginLibraryError("no cmake was found", todo=_GET_CMAKE)
    version = _version_of(Path(found), r"version (\d+)\.(\d+)", _GET_CMAKE)
    if version < MIN_CMAKE:
        raise PluginLibraryError(
            f"{found} is too old",
            expected=f"CMake {_spell(MIN_CMAKE)} or later",
            found=_spell(version),
            todo=_GET_CMAKE,
        )
    return Path(found), version


def _find_compiler() -> Path:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found is not None:
            return Path(found)
    raise PluginLibraryError("no C++ compiler was found", todo=_GET_COMPILER)


def _answer_of(program: Path, question: str, todo: str) -> str:
    try:
        done = subprocess.run([program, question], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise PluginLibraryError(f"{program} does not run: {error.strerror}", todo=todo) from error
    return done.stdout


def _version_of(program: Path, pattern: str, todo: str) -> tuple[int, int]:
    found = re.search(pattern, _answer_of(program, "--version", todo))
    if found is None:
        raise PluginLibraryError(f"{program} does not report its version", todo=todo)
    return int(found[1]), int(found[2])


def _header_version(path: Path) -> tuple[int, int]:
    """Read the version from `#define`s: NV_TENSORRT_MAJOR is a number, or from 10.15 on TRT_MAJOR_ENTERPRISE."""
    text = path.read_text(encoding="utf-8", errors="replace")

    def number(part: str) -> int | None:
        for name in (f"TRT_{part}_ENTERPRISE", f"NV_TENSORRT_{part}"):
            found = re.search(rf"^#define\s+{name}\s+(\d+)", text, re.MULTILINE)
            if found:
                return int(found[1])
        return None

    major, minor = number("MAJOR"), number("MINOR")
    if major is None or minor is None:
        raise PluginLibraryError(f"{path} does not define TensorRT's version", todo=_GET_HEADERS)
    return major, minor


def _run_cmake(
    tools: Toolchain, work: Path, architectures: Sequence[str], jobs: int | None, on_progress: OnProgress
) -> Path:
    """Configure and build. Returns: the folder with the library."""
    ninja = shutil.which("ninja")
    configure = [
        str(tools.cmake),
        *("-S", str(SOURCE_FOLDER), "-B", str(work)),
        *("-G", "Ninja" if ninja else "Unix Makefiles"),
        f"-DCMAKE_CUDA_COMPILER={tools.nvcc}",
        f"-DCMAKE_CXX_COMPILER={tools.compiler}",
        f"-DCMAKE_CUDA_HOST_COMPILER={tools.compiler}",
        f"-DGSX_ARCHITECTURES={';'.join(architectures)}",
        *([f"-DGSX_TENSORRT_INCLUDE={tools.headers.folder}"] if tools.headers else []),
    ]
    # The compilers' temporary files go into the same folder, where the free space was checked, and are removed with it.
    environment = {**os.environ, "TMPDIR": str(work)}
    _run(configure, environment, lambda line: on_progress(Progress("configuring")))
    count = jobs or os.cpu_count() or 1

    def show(line: str) -> None:
        step = _STEP.match(line)
        if step and step[1]:
            on_progress(Progress("compiling", int(step[1]), int(step[2])))
        elif step:
            on_progress(Progress("compiling", int(step[4]), 100))

    _run([str(tools.cmake), "--build", str(work), "--parallel", str(count)], environment, show)
    return work


def _run(command: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that it can be ended together with all its child processes
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                on_line(lines[-1])
        except BaseException:
            # End the whole group: if only CMake were ended, Ninja or Make and the compilers would go on.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            for _ in process.stdout:
                pass
            raise
    if process.returncode:
        errors = [line for line in lines if re.search(r"\b(error|fatal|Error)\b", line)] or lines
        raise PluginLibraryError(
            f"building the plugins failed: {' '.join(command[:2])} ended with {process.returncode}",
            found="\n    ".join(["the compiler said:", *errors[:_LOG_LINES]]),
            todo="if the tools are in order, report this with the output of `gsx doctor`",
        )


def _spell(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
