"""Which GPUs a plugin library has code for: engines with plugins are for no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.backend import dotted
from gsx_plugins.library import record_of


def with_kernels(library: Path | None, requested: Sequence[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
    """The chosen targets that a library has code for. One without a record of its build is taken to have it.

    Args: requested: what the user asked for; without it, targets that the library lacks are left out.
    Raises:
        EngineError: a requested target, or this machine's GPU, is not among them.
    """
    record = record_of(library) if library is not None else None
    having = tuple(target for target in chosen if record is None or record.runs_on(target))
    if having == chosen or (having and not requested):
        return having
    assert record is not None
    missing = [target for target in chosen if target not in having]
    raise EngineError(
        f"the plugin library {library} has no code for compute capability {', '.join(map(dotted, missing))}",
        expected=f"one that is built for {', '.join(map(dotted, chosen))}",
        found=f"one for {', '.join(record.architectures)}",
        todo="gsx plugins build --force makes one for all GPUs; --plugins none builds without it",
    )
