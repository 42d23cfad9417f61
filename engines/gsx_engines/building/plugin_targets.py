"""The GPUs that a plugin library has code for: engines with plugins run on no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.backend import dotted
from gsx_plugins.library import record_of


def with_kernels(library: Path | None, requested: Sequence[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
    """The chosen targets that a library has code for. A library without a record of its build is trusted to have it.

    Args:
        library: the plugin library; None without plugins.
        requested: the targets that the user asked for. If there are none, targets that the library lacks are left out.
        chosen: the targets to build for, e.g. "89".
    Raises:
        EngineError: the library lacks a requested target, or all of the chosen ones.
    """
    record = record_of(library) if library is not None else None
    present = tuple(target for target in chosen if record is None or record.runs_on(target))
    if present == chosen or (present and not requested):
        return present
    assert record is not None
    missing = [target for target in chosen if target not in present]
    raise EngineError(
        f"the plugin library {library} has no code for compute capability {', '.join(map(dotted, missing))}",
        expected=f"one built for {', '.join(map(dotted, chosen))}",
        found=f"one for {', '.join(record.architectures)}",
        todo="gsx plugins build --force makes one for all GPUs; --plugins none builds without plugins",
    )
