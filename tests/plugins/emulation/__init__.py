"""The kernels' own sources, compiled for the CPU (cuda_runtime.h beside this file says how)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from gsx_plugins.files import cache_folder
from gsx_plugins.library import SOURCE_FOLDER, source_hash

_HERE = Path(__file__).parent
KERNELS = (
    SOURCE_FOLDER / "native/status.cpp",
    SOURCE_FOLDER / "native/gather_rows.cu",
    SOURCE_FOLDER / "topk_gather/kernel.cu",
    SOURCE_FOLDER / "threshold_gather/kernel.cu",
    SOURCE_FOLDER / "gated_scatter_add/kernel.cu",
    SOURCE_FOLDER / "skip_branch/kernel.cu",
    SOURCE_FOLDER / "step_attention/kernel.cu",
    SOURCE_FOLDER / "step_attention/float16.cu",
    SOURCE_FOLDER / "step_attention/bfloat16.cu",
)


def cuda_include() -> Path | None:
    """The folder of CUDA's headers; None if there is no toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    found = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in found if (folder / "cuda_fp16.h").is_file()), None)


def emulated_library(name: str = "kernels", sources: Sequence[Path] = KERNELS, *, headers: Sequence[Path] = ()) -> Path:
    """The emulated kernels as a shared library; built once per state of the sources. Skips if it cannot be built.

    Args:
        name: the library's name.
        sources: its sources, besides the emulation.
        headers: folders of further headers that they need, besides CUDA's.
    """
    cuda, compiler = cuda_include(), shutil.which("g++")
    if cuda is None or compiler is None:
        pytest.skip("emulated kernels: need g++ and CUDA's headers (install the CUDA toolkit)")
    own = b"".join(path.read_bytes() for path in sorted(_HERE.iterdir()) if path.is_file())
    told = f"{source_hash()} {' '.join(map(str, headers))}"
    digest = hashlib.sha256(told.encode() + own).hexdigest()[:16]
    library = cache_folder() / "emulation" / f"{name}-{digest}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as work:
        fresh = Path(work) / library.name
        _compile(compiler, [*headers, cuda, cuda / "cccl"], sources, fresh)
        fresh.replace(library)
    return library


def _compile(compiler: str, headers: Sequence[Path], sources: Sequence[Path], library: Path) -> None:
    """Compile for the emulation, into a folder that contains nothing else."""
    flags = [compiler, "-std=c++17", "-O2", "-g", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    # Each library in a process has its own of everything, shared memory in templates too.
    flags += ["-fno-gnu-unique", "-ffp-contract=off", f"-I{_HERE}", f"-I{SOURCE_FOLDER}"]
    flags += [part for folder in headers for part in ("-isystem", str(folder))] + ["-x", "c++"]
    watched = ["-fsanitize=thread", "--param=tsan-distinguish-volatile=1"]
    jobs = [(source, watched) for source in sources]
    jobs += [(_HERE / name, []) for name in ("races.cpp", "emulation.cpp")]
    objects = [library.with_name(f"{number}.o") for number in range(len(jobs))]
    for (source, more), made in zip(jobs, objects, strict=True):
        _run([*flags, *more, "-c", str(source), "-o", str(made)])
    _run([compiler, "-shared", *map(str, objects), "-o", str(library)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
