"""The kernels' own sources, compiled for the CPU (cuda_runtime.h beside this file says how)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.library import SOURCE_FOLDER, cache_folder, source_hash

_HERE = Path(__file__).parent
_SOURCES = (
    "native/status.cpp",
    "native/gather_rows.cu",
    "topk_gather/kernel.cu",
    "threshold_gather/kernel.cu",
    "gated_scatter_add/kernel.cu",
)


def cuda_include() -> Path | None:
    """The folder of CUDA's headers; None where there is no toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    found = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in found if (folder / "cuda_fp16.h").is_file()), None)


def emulated_library() -> Path:
    """The emulated kernels as a shared library; built once per state of the sources. Skips where that cannot be."""
    include, compiler = cuda_include(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("emulated kernels: need g++ and CUDA's headers (install the CUDA toolkit)")
    own = b"".join((_HERE / name).read_bytes() for name in ("cuda_runtime.h", "emulation.cpp"))
    name = hashlib.sha256(source_hash().encode() + own).hexdigest()[:16]
    library = cache_folder() / "emulation" / f"{name}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}.so")
    command = [compiler, "-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-ffp-contract=off", f"-I{_HERE}", f"-I{SOURCE_FOLDER}"]
    command += ["-isystem", str(include), "-isystem", str(include / "cccl"), "-x", "c++"]
    command += [str(SOURCE_FOLDER / source) for source in _SOURCES] + [str(_HERE / "emulation.cpp"), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fresh.replace(library)
    return library
