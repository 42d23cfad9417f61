"""Loading the plugin library into TensorRT."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from gsx_engines.errors import EngineError
from gsx_plugins.library import PLUGIN_NAMESPACE, PLUGIN_OPS

# What TensorRT asks a library of plugins for.
_ENTRY = "getCreators"


def load_plugins(registry: Any, library: Path) -> None:
    """Register the plugins of a library with a builder's or a runtime's registry.

    Raises:
        EngineError: the file is no library, or not one of gsx's plugins, or TensorRT does not take it.
    """
    try:
        reason = "" if hasattr(ctypes.CDLL(str(library)), _ENTRY) else f"no {_ENTRY}: it holds no TensorRT plugins"
    except OSError as error:
        reason = str(error)
    if not reason and registry.load_library(str(library)) is None:
        reason = "TensorRT refuses it"
    if not reason:
        there = {creator.name for creator in registry.all_creators if creator.plugin_namespace == PLUGIN_NAMESPACE}
        if missing := [op for op in PLUGIN_OPS if op not in there]:
            reason = f"it has no plugin of {', '.join(missing)}: another version of gsx made it, or other people"
    if reason:
        raise EngineError(
            f"the plugin library {library} does not load",
            found=reason,
            todo="gsx plugins build makes one for this machine",
        )
