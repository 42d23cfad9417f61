"""Loading the plugin library into TensorRT."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from gsx_engines.errors import EngineError
from gsx_plugins.library import PLUGIN_NAMESPACE, PLUGIN_OPS, STEP_OPS

# The function through which TensorRT finds the plugins of a library.
_ENTRY = "getCreators"


def load_plugins(registry: Any, library: Path) -> None:
    """Register the plugins of a library with the registry of a builder or a runtime.

    Raises:
        EngineError: the file is not a library, or not one with gsx's plugins, or TensorRT refuses it.
    """
    try:
        reason = "" if hasattr(ctypes.CDLL(str(library)), _ENTRY) else f"no {_ENTRY}: it has no TensorRT plugins"
    except OSError as error:
        reason = str(error)
    if not reason and registry.load_library(str(library)) is None:
        reason = "TensorRT refuses it"
    if not reason:
        there = {creator.name for creator in registry.all_creators if creator.plugin_namespace == PLUGIN_NAMESPACE}
        if missing := [op for op in (*PLUGIN_OPS, *STEP_OPS) if op not in there]:
            reason = f"it has no plugin for {', '.join(missing)}: it is from another version of gsx, or not from gsx"
    if reason:
        raise EngineError(
            f"the plugin library {library} does not load",
            found=reason,
            todo="gsx plugins build makes one for this machine",
        )
