"""Finding the native library, which contains the CUDA kernels and the TensorRT plugins around them.

It is built once for each version of its sources (`gsx_plugins/build.py`) and kept in the user's cache, in a folder
named by the hash of the sources, so that changed sources never use an old library. `GSX_PLUGIN_LIBRARY` can name
another one. This module imports only the standard library: a runner looks for plugins before it knows whether anything
can be built.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from gsx_plugins.errors import PluginLibraryError
from gsx_plugins.files import cache_folder

LIBRARY_VARIABLE = "GSX_PLUGIN_LIBRARY"
# The library with plugins for TensorRT, and the one with only the kernels, for machines without TensorRT's headers.
PLUGIN_LIBRARY_NAME = "libgsx_plugins.so"
KERNEL_LIBRARY_NAME = "libgsx_kernels.so"
# Ops with a kernel and a plugin; the other ops always run as standard ops.
PLUGIN_OPS = ("TopKGather", "ThresholdGather", "GatedScatterAdd")
# Ops that only lowering for TensorRT makes, for steps of a few rows.
_PRODUCT_OPS = ("SkipLinear", "SkipGateUp", "SkipLinearAdd", "GateLinear")
# How the weights of a step's product are stored -> the ending of the op's name: in the rows' type, or as 8-bit codes.
STEP_WEIGHTS = {"rows": "", "int8": "Int8", "e4m3": "E4M3"}
# By folder.
STEP_FOLDERS = {
    "skip_branch": tuple(op + ending for ending in STEP_WEIGHTS.values() for op in _PRODUCT_OPS),
    "step_attention": ("SkipAttention", "StepAttention"),
}
STEP_OPS = tuple(op for ops in STEP_FOLDERS.values() for op in ops)
MOST_STEP_ROWS = 8
PLUGIN_NAMESPACE, PLUGIN_VERSION = "gsx", "1"

SOURCE_FOLDER = Path(__file__).parent
_SOURCE_SUFFIXES = {".h", ".cuh", ".cu", ".cpp"}
_RECORD_NAME = "build.json"
_NAME_DIGITS = 16  # digits of the hash in a folder's name


@dataclass(frozen=True)
class BuildRecord:
    """How a library was built; stored beside the library as `<library>.build.json`.

    Args:
        source_hash: of the sources that it was built from.
        architectures: in CMake's spelling, e.g. `90-real`.
        nvcc: version of the compiler.
        tensorrt_headers: their version; None for a library with only the kernels.
        seconds: how long the build took.
    """

    source_hash: str
    architectures: tuple[str, ...]
    nvcc: str
    tensorrt_headers: str | None
    seconds: float

    def runs_on(self, capability: str) -> bool:
        """Whether the library has code for a GPU of a compute capability (e.g. "89").

        Machine code runs on GPUs of the same major version whose minor version is not lower; PTX on all that are not
        older. Code for one architecture (`90a`) runs on that one only, code for a family (`120f`) on its major version.
        """
        wanted = int(capability)
        for name in self.architectures:
            number, _, kind = name.partition("-")
            own, bound = int(number.rstrip("af")), number[-1] if number[-1] in "af" else ""
            machine = kind != "virtual" and own // 10 == wanted // 10
            later = machine if bound == "f" else not bound and (machine or kind != "real")
            if own == wanted or (own < wanted and later):
                return True
        return False


def native_sources() -> Sequence[Path]:
    """The files that the library is built from."""
    found = [path for path in SOURCE_FOLDER.rglob("*") if path.suffix in _SOURCE_SUFFIXES]
    return [SOURCE_FOLDER / "CMakeLists.txt", *sorted(found)]


@cache
def source_hash() -> str:
    """SHA-256 of the native sources, including their names."""
    digest = hashlib.sha256()
    for path in native_sources():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCE_FOLDER).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def library_folder() -> Path:
    """The folder of libraries built from the current sources."""
    return cache_folder() / "plugins" / source_hash()[:_NAME_DIGITS]


def find_library() -> Path | None:
    """The plugin library: the one that `GSX_PLUGIN_LIBRARY` names, else the one built from the current sources.

    Returns: None if there is none.
    Raises:
        PluginLibraryError: the variable names a file that does not exist.
    """
    return _named() or _built(PLUGIN_LIBRARY_NAME)


def find_kernels() -> Path | None:
    """A library with the kernels' C interface: the plugin library, else the one with only the kernels."""
    return find_library() or _built(KERNEL_LIBRARY_NAME)


def library_hash(path: Path) -> str:
    """SHA-256 of a library file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(library: Path) -> BuildRecord | None:
    """How a library was built; None without a readable record."""
    try:
        found = json.loads(_record_path(library).read_text(encoding="utf-8"))
        return BuildRecord(**{**found, "architectures": tuple(found["architectures"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(library: Path, record: BuildRecord) -> None:
    """Write the record beside the library."""
    _record_path(library).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def _record_path(library: Path) -> Path:
    return library.with_name(f"{library.stem}.{_RECORD_NAME}")


def _named() -> Path | None:
    name = os.environ.get(LIBRARY_VARIABLE)
    if not name:
        return None
    path = Path(name)
    if not path.is_file():
        raise PluginLibraryError(
            f"{LIBRARY_VARIABLE} names a file that does not exist",
            expected=f"a {PLUGIN_LIBRARY_NAME}",
            found=f"nothing at {name}",
            todo="run `gsx plugins build` and unset it, or correct it",
        )
    return path.resolve()


def _built(name: str) -> Path | None:
    path = library_folder() / name
    return path if path.is_file() else None
