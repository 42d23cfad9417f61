"""Engines at run time, on a GPU: `pytest -m gpu tests/engines/test_tensorrt_gpu.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.building.build import build
from engines.bundle.bundle import open_bundle
from engines.bundle.controls import controls_for
from engines.generation import generate
from engines.runners.portable import PortableStage
from engines.runners.tensorrt import open_stage
from engines.runners.whole import WholeRunner
from engines.tensorrt import cuda
from engines.tensorrt.backend import Backend, load_module
from engines.tensorrt.plugins import plugin_library

pytestmark = pytest.mark.gpu
PROMPT = [5, 60, 61, 7, 8, 9, 200, 11]
# Two orders of summation of float32 products at logits of order 10, and other kernels for exp and rsqrt.
LOGITS_ATOL = 5e-4


def backends() -> list[Backend]:
    """The TensorRTs that are installed."""
    found: list[Backend] = []
    for backend in ("tensorrt", "tensorrt-rtx"):
        try:
            load_module(backend)  # type: ignore[arg-type]
        except Exception:  # not installed, or it does not load
            continue
        found.append(backend)  # type: ignore[arg-type]
    return found


@pytest.fixture(autouse=True)
def a_gpu() -> None:
    """Where a GPU is promised (GSX_GPU=1), its absence is a failure and no skip."""
    if cuda.device() is None:
        if os.environ.get("GSX_GPU") == "1":
            pytest.fail(f"GSX_GPU=1, and no GPU: {cuda.why_not()}")
        pytest.skip(f"needs an NVIDIA GPU: {cuda.why_not()}")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("plugins", ["none", "auto"])
@pytest.mark.parametrize("options", [{}, {"select": "rank", "calibration": None}], ids=["threshold", "rank"])
def test_an_engine_computes_what_onnx_runtime_computes(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, backend: Backend, plugins: str, options: dict[str, object]
) -> None:
    if backend not in backends():
        pytest.skip(f"{backend} is not installed")
    if plugins == "auto" and plugin_library() is None:
        pytest.skip("no plugin library was built: gsx plugins build")
    directory = Path(shutil.copytree(make_tiny_bundle(**options), tmp_path / "bundle"))
    build(directory, backend=backend, plugins=plugins, context=160)  # type: ignore[arg-type]
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
