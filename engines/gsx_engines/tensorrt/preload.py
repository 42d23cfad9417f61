"""Loading TensorRT-RTX so that plugins work with it.

When a plugin is used, the ONNX parser of TensorRT-RTX 1.7 opens `libtensorrt_rtx.so` by that bare name. Its wheel
ships the file under a versioned name only, so nothing is found and the process ends ("terminate called without an
active exception"). The parser looks beside itself (its RPATH is $ORIGIN), and "beside" is where it was first loaded
from. So it is loaded here, before anything else loads it, from a folder of links that holds both names. The links lead
to the wheel's own files: every later load finds the libraries in memory. Can go when the wheel ships the bare name.
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
    """Load TensorRT-RTX's libraries from where its parser finds them; call it before `import tensorrt_rtx`.

    Returns: whether a plugin can be used in this process: false where TensorRT-RTX is not installed, or was imported
        before in the way that does not work. Doing it again changes nothing.
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
    except OSError:  # a cache that cannot be written; this folder goes with the process
        folder = Path(tempfile.mkdtemp(prefix="gsx-tensorrt-rtx-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _make_links(folder, links)
    _loaded.extend(ctypes.CDLL(str(folder / files[-1].name)) for files in found.values())
    return True


def _make_links(folder: Path, links: Mapping[str, Path]) -> None:
    """Make links by name, also while another process makes the same ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        link = folder / name
        if link.is_symlink() and link.readlink() == target:
            continue
        with writing_file(link) as fresh:
            fresh.symlink_to(target)
