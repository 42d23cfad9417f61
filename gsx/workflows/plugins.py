"""`gsx plugins`: build and inspect the native library."""

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
    """The library that would be used. `record` is None if it is unknown how it was built; `plugins` is false if it has
    only kernels."""

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
    """Build the library of CUDA kernels and TensorRT plugins, unless it was already built from these sources.

    Args:
        architectures: GPU architectures to build for: `90` (machine code and PTX), `90-real`, `90-virtual`.
        kernels_only: leave out the TensorRT plugins; then no TensorRT headers are needed.
        force: build even if the library exists.
        jobs: compilers that run in parallel; None for one per processor.
        on_progress: called with the progress.
    Returns: the library's path, how it was built, and whether it existed already.
    Raises:
        UsageError: an architecture is unknown, or `jobs` is below 1.
        PluginLibraryError: a tool is missing; the error says how to get it.
    Example, on a machine with nvcc and TensorRT's headers:
        >>> built = gsx.plugins.build(architectures=["90"])  # doctest: +SKIP
        >>> built.path.name  # doctest: +SKIP
        'libgsx_plugins.so'
    """
    if jobs is not None and jobs < 1:
        raise UsageError("--jobs: too few", expected="1 or more", found=str(jobs))
    return build(
        architectures=architectures, kernels_only=kernels_only, force=force, jobs=jobs, on_progress=on_progress
    )


def list_plugins() -> PluginList:
    """List the custom ops, and the library that implements them.

    Returns: a row per op, and the facts about the library; None if it is not built.
    Raises:
        PluginLibraryError: the environment variable names a file that is not a library of gsx.
    Example:
        >>> [op.name for op in gsx.plugins.list().ops if op.native][:2]
        ['TopKGather', 'ThresholdGather']
    """
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
    """The facts about a library file.

    Raises: PluginLibraryError if it is another kind of file.
    """
    record = record_of(path)
    content = b"" if record else path.read_bytes()
    if not record and _ANSWER not in content:
        raise PluginLibraryError(
            f"{path}: is not the library of gsx's kernels and plugins",
            expected="a library from `gsx plugins build`",
            found=f"a file of {len(content)} bytes without {_ANSWER.decode()}",
            todo=f"unset {LIBRARY_VARIABLE}, or set it to such a library",
        )
    has_plugins = record.tensorrt_headers is not None if record else b"getCreators" in content
    return LibraryFacts(path, library_hash(path), path.stat().st_size, has_plugins, record)
