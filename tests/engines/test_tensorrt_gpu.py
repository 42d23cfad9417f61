"""Engines at run time, on a GPU: `pytest -m gpu tests/engines/test_tensorrt_gpu.py`."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from gsx_engines.building.build import build
from gsx_engines.bundle.bundle import Bundle, open_bundle, sha256_of, write_manifest
from gsx_engines.bundle.controls import controls_for
from gsx_engines.errors import EngineError
from gsx_engines.generation.generate import generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.tensorrt import open_stage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.backend import Backend, load_module
from gsx_engines.tensorrt.kernel_cache import kernel_cache_path
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES
from gsx_plugins.library import find_library

pytestmark = pytest.mark.gpu
BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")
PROMPT = [5, 60, 61, 7, 8, 9, 200, 11]
# Two orders of summation of float32 products at logits of order 10, and other kernels for exp and rsqrt.
LOGITS_ATOL = 5e-4


def backends() -> list[Backend]:
    """The TensorRTs that are installed."""
    found: list[Backend] = []
    for backend in BACKENDS:
        try:
            load_module(backend)
        except Exception:  # not installed, or it does not load
            continue
        found.append(backend)
    return found


@pytest.fixture(autouse=True)
def a_gpu() -> None:
    """If a GPU is promised (GSX_GPU=1), its absence is a failure, not a skip."""
    if cuda.device() is None:
        if os.environ.get("GSX_GPU") == "1":
            pytest.fail(f"GSX_GPU=1, and no GPU: {cuda.why_not()}")
        pytest.skip(f"needs an NVIDIA GPU: {cuda.why_not()}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plugins", ["none", "auto"])
@pytest.mark.parametrize("options", [{}, {"select": "rank", "calibration": None}], ids=["threshold", "rank"])
def test_an_engine_computes_what_onnx_runtime_computes(
    make_tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    backend: Backend,
    plugins: Literal["none", "auto"],
    options: dict[str, Any],
) -> None:
    if backend not in backends():
        pytest.skip(f"{backend} is not installed")
    if plugins == "auto" and find_library() is None:
        pytest.skip("no plugin library was built: gsx plugins build")
    directory = Path(shutil.copytree(make_tiny_bundle(**options), tmp_path / "bundle"))
    build(directory, backend=backend, plugins=plugins, context=160)
    bundle = open_bundle(directory)
    portable = WholeRunner(PortableStage(bundle))
    for cuda_graphs in (False, True):
        runner = WholeRunner(open_stage(bundle, backend, cuda_graphs=cuda_graphs))
        caches = [one.new_cache(1, 160) for one in (portable, runner)]
        controls = controls_for(bundle.manifest)
        ids = np.random.default_rng(0).integers(3, 250, (1, 40))
        for start, stop in ((0, 30), *((n, n + 1) for n in range(30, 40))):
            want, found = (
                one.step(cache, ids[:, start:stop], controls, logits="all")
                for one, cache in zip((portable, runner), caches, strict=True)
            )
            np.testing.assert_allclose(found.logits, want.logits, atol=LOGITS_ATOL)
            np.testing.assert_array_equal(found.kept, want.kept)
        texts = [generate(one, [PROMPT], max_new_tokens=80).sequences for one in (portable, runner)]
        assert texts[0] == texts[1]


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def built(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path) -> tuple[Bundle, Backend, str]:
    """A bundle with engines for the GPU at hand, their backend and their name."""
    backend: Backend = request.param
    if backend not in backends():
        pytest.skip(f"{backend} is not installed")
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    name, entry = build(directory, backend=backend, context=64)
    device = cuda.device()
    assert device is not None
    if device.capability not in entry.targets:
        pytest.skip(f"{backend} does not build for this GPU ({device.name}): python -m tests.gpu --parts engines")
    return open_bundle(directory), backend, name


def test_an_engine_that_tensorrt_refuses_is_an_error_with_a_message(built: tuple[Bundle, Backend, str]) -> None:
    """Bytes that pass our own checks but not TensorRT's: the process survives, and the message says what to do."""
    bundle, backend, name = built
    folder = bundle.directory / ENGINES / name
    entry = bundle.manifest.engines[name]
    path = folder / entry.graphs["model"].file
    path.write_bytes(path.read_bytes()[: entry.graphs["model"].size_bytes // 2])
    graph = entry.graphs["model"].model_copy(update={"size_bytes": path.stat().st_size, "sha256": sha256_of(path)})
    entry = entry.model_copy(update={"graphs": {**entry.graphs, "model": graph}})
    (folder / ENGINE_FILE).write_text(entry.model_dump_json())
    write_manifest(bundle.directory, bundle.manifest.model_copy(update={"engines": {name: entry}}))
    with pytest.raises(EngineError, match=r"cannot load the engine\n.*\n.*gsx build"):
        open_stage(open_bundle(bundle.directory), backend)


def test_an_engine_without_its_plugins_is_not_loaded(
    built: tuple[Bundle, Backend, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, backend, name = built
    if bundle.manifest.engines[name].plugins is None:
        pytest.skip("no plugin library was built: gsx plugins build")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(
        EngineError, match=r"the plugin library differs\n.*found no plugin library\n.*gsx plugins build"
    ):
        open_stage(bundle, backend)


def test_compiled_kernels_are_kept(
    built: tuple[Bundle, Backend, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX compiles in the first run; the second reads what the first one left, and writes the same."""
    bundle, backend, name = built
    if backend != "tensorrt-rtx":
        pytest.skip("engines of TensorRT hold their kernels")
    if (library := find_library()) is not None:
        monkeypatch.setenv("GSX_PLUGIN_LIBRARY", str(library))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = cuda.device()
    assert device is not None
    path = kernel_cache_path(bundle.manifest.engines[name].graphs["model"].sha256, device.capability)
    texts = []
    for there_before in (False, True):
        assert path.exists() == there_before
        runner = WholeRunner(open_stage(bundle, backend))
        texts.append(generate(runner, [PROMPT], max_new_tokens=8).sequences)
        del runner
        gc.collect()
    assert path.stat().st_size > 0
    assert texts[0] == texts[1]
