"""A model repository for Triton Inference Server, made from a bundle and ready to start.

    REPO/NAME/
      config.pbtxt
      requirements.txt      what the server's Python needs
      1/model.py            imports gsx_engines.serving.triton_model
      1/gsx_engines/ 1/gsx_plugins/   gsx's own packages, of the version that made the repository
      1/bundle/             the bundle

The packages are copied, so that gsx need not be installed on the server, and bundle and code always have the same
version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

import gsx_engines
import gsx_plugins
from gsx_engines.bundle.bundle import Bundle, writing
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.defaults import SERVED_REQUESTS, WAITING_REQUESTS
from gsx_engines.errors import EngineError
from gsx_engines.serving.fields import FORMS, Field, Form
from gsx_engines.serving.model_config import Tensor, TritonConfig
from gsx_plugins.errors import UsageError
from gsx_plugins.library import native_sources

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
MODEL = '''"""gsx on Triton's Python backend: the model is in the packages beside this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gsx_engines.serving.triton_model import TritonPythonModel  # noqa: E402, F401
'''
# Triton's Python backend uses the C interface of NumPy 1, at least up to release 2.51: with NumPy 2, tensors arrive
# empty or wrong, without an error (docs/triton.md).
_REQUIREMENTS = ("numpy>=1.26,<2", "jinja2>=3.1.6", "onnx>=1.20", "pydantic>=2.7", "tokenizers>=0.20")
_RUNTIME = {
    "onnxruntime": ("onnxruntime>=1.24",),
    "tensorrt": ("onnxruntime>=1.24", "cuda-bindings>=12.6", "tensorrt=={version}"),
    "tensorrt-rtx": ("onnxruntime>=1.24", "cuda-bindings>=12.6", "tensorrt-rtx=={version}"),
}
# Files for people, which a server does not need.
_LEFT_OUT = ("parity.json", "parity.html")


def write_repository(
    bundle: Bundle,
    target: Path,
    *,
    name: str,
    backend: Backend = "onnxruntime",
    slots: int = SERVED_REQUESTS,
    queue: int = WAITING_REQUESTS,
    context: int | None = None,
    threads: int | None = None,
    form: str = "gsx",
    gpus: Sequence[int] = (),
) -> Path:
    """Write a repository with one model.

    Args:
        bundle: what to serve.
        target: the repository; it must not exist yet, or be an empty directory.
        name: of the model.
        backend: the runtime; the TensorRT backends need engines in the bundle.
        slots: how many requests run at once.
        queue: how many requests may wait.
        context: maximum number of tokens of a request, prompt and new ones; None for the model's context, or for as
            many as the engines hold.
        threads: of ONNX Runtime; None for a number that leaves a processor to the server (`threads.py`).
        form: of requests and responses, one of `fields.FORMS`.
        gpus: numbers of the GPUs that get an instance each, with the TensorRT backends; empty for all that Triton sees.
    Returns: the directory of the model.
    Raises:
        UsageError: the target is occupied, or a number or name cannot be used.
        EngineError: the bundle has no engines for the backend.
    """
    _check(bundle, slots, queue, context, threads)
    _check_gpus(gpus, backend)
    entries = _engines(bundle, backend, slots)
    version = entries[0].tensorrt_version if entries else None
    if entries:
        context = _context_of(bundle, entries, context)
    config = _config(
        name, backend, slots=slots, queue=queue, context=context, threads=threads, form=FORMS[form], gpus=tuple(gpus)
    )
    with writing(target, overwrite=False, needed_bytes=_size(bundle.directory)) as work:
        version_directory = work / name / "1"
        version_directory.mkdir(parents=True)
        (work / name / "config.pbtxt").write_text(config.text(), encoding="utf-8")
        lines = [line.format(version=version) for line in (*_REQUIREMENTS, *_RUNTIME[backend])]
        (work / name / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (version_directory / "model.py").write_text(MODEL, encoding="utf-8")
        for package in (gsx_engines, gsx_plugins):
            _copy_package(Path(package.__path__[0]), version_directory)
        left_out = _LEFT_OUT if version else (*_LEFT_OUT, "engines")
        shutil.copytree(
            bundle.directory,
            version_directory / "bundle",
            ignore=lambda place, names: left_out if Path(place) == bundle.directory else (),
        )
    return target / name


def _config(
    name: str,
    backend: Backend,
    *,
    slots: int,
    queue: int,
    context: int | None,
    threads: int | None,
    form: Form,
    gpus: tuple[int, ...],
) -> TritonConfig:
    numbers = {"slots": slots, "queue": queue, "context": context, "threads": threads}
    try:
        return TritonConfig(
            name=name,
            backend="python",
            inputs=tuple(_tensor(field, optional=True) for field in form.inputs),
            outputs=tuple(_tensor(field, optional=False) for field in form.outputs),
            kind="KIND_CPU" if backend == "onnxruntime" else "KIND_GPU",
            decoupled=True,
            batch=form.batch,
            gpus=gpus,
            parameters={
                "backend": backend,
                "form": form.name,
                **{key: str(n) for key, n in numbers.items() if n is not None},
            },
        )
    except ValidationError as error:  # only the name comes from the user
        raise UsageError(
            "the model's name is not valid",
            expected="letters, digits, '_', '-' and '.', beginning with none of the last two",
            found=repr(name),
        ) from error


def _tensor(field: Field, *, optional: bool) -> Tensor:
    return Tensor(name=field.name, data_type=field.data_type, dims=(-1,) if field.many else (1,), optional=optional)


def _check(bundle: Bundle, slots: int, queue: int, context: int | None, threads: int | None) -> None:
    most = bundle.manifest.decoder.max_positions
    for what, number, least in (("slots", slots, 1), ("queue", queue, 0), ("threads", threads, 1)):
        if number is not None and number < least:
            raise UsageError(f"{what} is out of range", expected=f"at least {least}", found=str(number))
    if context is not None and not 2 <= context <= most:
        raise UsageError(
            "context is out of range", expected=f"2 to {most} tokens, the model's context", found=str(context)
        )


def _check_gpus(gpus: Sequence[int], backend: Backend) -> None:
    named = ", ".join(map(str, gpus))
    if gpus and backend == "onnxruntime":
        raise UsageError(
            "the backend onnxruntime runs on the CPU and takes no GPUs",
            expected="--backend tensorrt or tensorrt-rtx with --gpus",
            found=named,
        )
    if len(set(gpus)) != len(gpus) or min(gpus, default=0) < 0:
        raise UsageError(
            "the GPUs are not valid",
            expected="different numbers from 0 on, as nvidia-smi shows them",
            found=named,
        )


def _context_of(bundle: Bundle, entries: Sequence[EngineEntry], context: int | None) -> int:
    """How many tokens a request may have: no more than the K/V buffers of the engines hold."""
    most = min(entry.capacity for entry in entries)
    if context is not None and context > most:
        raise EngineError(
            f"bundle {bundle.directory}: its engines hold fewer tokens than a request may have",
            expected=f"a context of at most {most}",
            found=str(context),
            todo=f"gsx build {bundle.directory} --backend {entries[0].backend} --context {context}",
        )
    return context or most


def _engines(bundle: Bundle, backend: Backend, slots: int) -> list[EngineEntry]:
    """The bundle's engines for a backend; none for ONNX Runtime."""
    if backend == "onnxruntime":
        return []
    own = {name: entry for name, entry in bundle.manifest.engines.items() if entry.backend == backend}
    entries = [entry for entry in own.values() if entry.kv_layout == "in-place"]
    build = f"gsx build {bundle.directory} --backend {backend} --batch {slots}"
    if not entries:
        others = ", ".join(bundle.manifest.engines) or "none"
        kind = f"{backend} that update K/V in place" if own else backend
        raise EngineError(f"bundle {bundle.directory}: has no engines for {kind}", found=others, todo=build)
    most = max(profile.batch.most for entry in entries for profile in entry.profiles)
    if most < slots:
        raise EngineError(
            f"bundle {bundle.directory}: its engines allow fewer sequences than there are slots",
            expected=f"batches of {slots}",
            found=f"batches of at most {most}",
            todo=f"gsx triton --slots {most}, or {build}",
        )
    return entries


def _copy_package(package: Path, target: Path) -> None:
    """Copy a package's code; that of the kernels too, since its hash says which plugin library belongs to it."""
    native = {path.name for path in native_sources()}

    def others(place: str, names: list[str]) -> list[str]:
        wanted = [name for name in names if name.endswith(".py") or name in native]
        return [name for name in names if name not in wanted and not os.path.isdir(os.path.join(place, name))]

    shutil.copytree(package, target / package.name, ignore=lambda place, names: {*others(place, names), "__pycache__"})


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
