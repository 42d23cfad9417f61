"""Loading TensorRT-RTX so that plugins work with it.

When a plugin is used, the ONNX parser of TensorRT-RTX 1.7 opens `libtensorrt_rtx.so` by that plain name. Its wheel
ships the file only under a versioned name, so the library is not found and the process ends ("terminate called without
an active exception"). The parser looks in its own folder (its RPATH is $ORIGIN), which is the one it was first loaded
from. So it is loaded here, before anything else loads it, from a folder with links under both names. The links point
to the wheel's own files, so every later load finds the libraries already in memory. This module can be removed when
the wheel ships the plain name.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from gsx_plugins.files import cache_folder, writing_file

_PACKAGE = "tensorrt_rtx_libs"
_CORE = "libtensorrt_rtx.so"
_PARSER = "libtensorrt_onnxparser_rtx.so"
_loaded: list[ctypes.CDLL] = []  # kept, so that they stay loaded


def preload_tensorrt_rtx() -> bool:
    """Load TensorRT-RTX's libraries so that its parser finds them. Must be called before `import tensorrt_rtx`.

    Calling it again changes nothing.

    Returns: whether plugins can be used in this process; False if TensorRT-RTX is not installed, or if it was already
        imported in the ordinary way.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return False
    wheel = Path(next(iter(spec.submodule_search_locations))).resolve()
    if (wheel / _CORE).exists() or _loaded:
        return True
    if _PACKAGE in sys.modules or "tensorrt_rtx_bindings" in sys.modules:
        return False
    found = {name: sorted(wheel.glob(f"{name}.*")) for name in (_CORE, _PARSER)}
    if not all(found.values()):
        return False
    links = {link: files[-1] for name, files in found.items() for link in (name, files[-1].name)}
    folder = cache_folder() / "tensorrt-rtx" / hashlib.sha256(str(wheel).encode()).hexdigest()[:16]
    try:
        _make_links(folder, links)
    except OSError:  # the cache cannot be written; this folder is removed when the process ends
        folder = Path(tempfile.mkdtemp(prefix="gsx-tensorrt-rtx-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _make_links(folder, links)
    _loaded.extend(ctypes.CDLL(str(folder / files[-1].name)) for files in found.values())
    return True


def _make_links(folder: Path, links: Mapping[str, Path]) -> None:
    """Make links by name, safe against another process that makes the same links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        link = folder / name
        if link.is_symlink() and link.readlink() == target:
            continue
        with writing_file(link) as fresh:
            fresh.symlink_to(target)
