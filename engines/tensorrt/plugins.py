"""The plugin library of this machine, and loading it into TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.errors import EngineError
from plugins.errors import PluginError
from plugins.library import find_library


def plugin_library() -> Path | None:
    """The plugin library that was built on this machine, or the one that the environment names; None: there is none.

    Raises:
        EngineError: the environment names a file that is not there.
    """
    try:
        return find_library()
    except PluginError as error:
        raise EngineError(error.what, expected=error.expected, found=error.found, todo=error.todo) from error


def load_plugins(registry: Any, library: Path) -> None:
    """Register the plugins of a library with a builder's or a runtime's registry.

    Raises:
        EngineError: TensorRT does not load it.
    """
    if registry.load_library(str(library)) is None:
        raise EngineError(
            f"{library}: TensorRT does not load this plugin library",
            todo="gsx plugins build makes one for this machine",
        )
