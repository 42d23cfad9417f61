"""`gsx plugins`: the native library, built and looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsx_plugins.build import ARCHITECTURES, Built, build
from gsx_plugins.errors import PluginLibraryError, UsageError
from gsx_plugins.library import LIBRARY_VARIABLE, PLUGIN_OPS, BuildRecord, find_kernels, library_hash, record_of
from gsx_plugins.progress import OnProgress, silent
from gsx_plugins.registry import OPS

# A function that every library of gsx has, with or without plugins.
_ANSWER = b"gsx_error_string"


@dataclass(frozen=True)
class OpRow:
    """An op of domain gsx: what it computes, and whether a CUDA kernel and a TensorRT plugin of it are in the library
    (the others are standard ops everywhere)."""

    name: str
    doc: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    native: bool


@dataclass(frozen=True)
class LibraryFacts:
    """The library that would be used. `record` is None where nothing tells how it was built; `plugins` is false for the
    kernels alone."""

    path: Path
    sha256: str
    bytes: int
    plugins: bool
    record: BuildRecord | None


@dataclass(frozen=True)
class PluginList:
    """All ops, and the library (None: not built yet)."""

    ops: tuple[OpRow, ...]
    library: LibraryFacts | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = asdict(self)
        if found["library"]:
            found["library"]["path"] = str(found["library"]["path"])
        return found


def build_plugins(
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    kernels_only: bool = False,
    force: bool = False,
    jobs: int | None = None,
    on_progress: OnProgress = silent,
) -> Built:
    """Build the library, unless it is there; the arguments are those of `gsx_plugins.build.build`.

    Raises: PluginLibraryError, which says what is missing and how to get it.
    """
    if jobs is not None and jobs < 1:
        raise UsageError("--jobs: too few", expected="1 or more", found=str(jobs))
    return build(
        architectures=architectures, kernels_only=kernels_only, force=force, jobs=jobs, on_progress=on_progress
    )


def list_plugins() -> PluginList:
    """The ops, and the library that is built."""
    rows = tuple(
        OpRow(
            name=op.name,
            doc=op.doc,
            inputs=tuple(name for name, _ in op.inputs),
            outputs=tuple(name for name, _ in op.outputs),
            native=op.name in PLUGIN_OPS,
        )
        for op in OPS.values()
    )
    path = find_kernels()
    return PluginList(rows, library_facts(path) if path else None)


def library_facts(path: Path) -> LibraryFacts:
    """What there is to know of a library file.

    Raises: PluginLibraryError where it is another kind of file.
    """
    record = record_of(path)
    content = b"" if record else path.read_bytes()
    if not record and _ANSWER not in content:
        raise PluginLibraryError(
            f"{path}: is not the library of gsx's kernels and plugins",
            expected="a library that `gsx plugins build` made",
            found=f"a file of {len(content)} bytes without {_ANSWER.decode()}",
            todo=f"unset {LIBRARY_VARIABLE}, or let it name such a library",
        )
    has_plugins = record.tensorrt_headers is not None if record else b"getCreators" in content
    return LibraryFacts(path, library_hash(path), path.stat().st_size, has_plugins, record)
