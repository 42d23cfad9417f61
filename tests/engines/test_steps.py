"""Engines for steps of one size, beside those for all calls: on a CPU, against the portable runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.lowering.tensorrt import lower
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from tests.engines.cpu_engine import CpuEngine, cpu_engines

# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
CAPACITY = 160
BUNDLES: dict[str, dict[str, Any]] = {
    "thresholds": {},
    "ranks": {"select": "rank", "calibration": None},
    "sets": {"policy": "layers:0,2", "budget": None, "calibration": None},
    "copied K and V": {"kv_policy": "copy", "budget": 0.5},
}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, make_tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(make_tiny_bundle(**BUNDLES[request.param]))


def with_steps(bundle: Bundle, batch: int, *sizes: tuple[int, int]) -> tuple[TensorRTStage, CpuEngine, list[CpuEngine]]:
    """A stage, its engine for all calls, and those for steps."""
    entry, engines = cpu_engines(bundle, default_profiles(CAPACITY, batch), capacity=CAPACITY)
    made = [cpu_engines(bundle, (), capacity=CAPACITY, step=size, rows=8) for size in sizes]
    steps = [(own, one["model"]) for own, one in made]
    stage = TensorRTStage(bundle.manifest, entry, "model", engines["model"], steps)
    return stage, engines["model"], [engine for _, engine in steps]


@pytest.mark.parametrize("batch", [1, 2])
def test_calls_of_their_size_and_no_others(bundle: Bundle, batch: int) -> None:
    """Up to the last column of the buffers, with fewer tokens of a sequence, and logits of all and of the last."""
    stage, general, steps = with_steps(bundle, batch, (batch, 1), (batch, 3))
    portable, runner = WholeRunner(PortableStage(bundle)), WholeRunner(stage)
    caches = [one.new_cache(batch, CAPACITY) for one in (portable, runner)]
    controls = controls_for(bundle.manifest)
    rng = np.random.default_rng(0)
    sizes = [7, 1, 3, 2, 3, 1, 60, 3, 60, 1, 1, CAPACITY - 143, 1]
    for number, size in enumerate(sizes):
        ids = rng.integers(3, 250, (batch, size))
        counts = [size - (row > 0 and number == 4) for row in range(batch)]
        want, found = (
            one.step(cache, ids, controls, counts=counts, logits="all" if number % 2 else "last")
            for one, cache in zip((portable, runner), caches, strict=True)
        )
        assert found.logits.shape == want.logits.shape
        for row, count in enumerate(counts):
            columns = slice(count) if number % 2 else slice(None)
            np.testing.assert_allclose(found.logits[row, columns], want.logits[row, columns], atol=LOGITS_ATOL)
        np.testing.assert_array_equal(found.kept, want.kept)
    calls = [[shapes["input_ids"] for _, shapes in engine.calls] for engine in (general, *steps)]
    of_size = [[(batch, size) for size in sizes if size == wanted] for wanted in (1, 3)]
    assert calls == [[(batch, size) for size in sizes if size not in (1, 3)], *of_size]


def test_all_sizes_are_numbers(bundle: Bundle) -> None:
    """But for those that say which branches run; and the cache is read as it is."""
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    made = lower(
        model, bundle.manifest, capacity=CAPACITY, rows=2, plugins=(), kv_layout="step", step=(1, 2)
    ).model.graph
    open_axes = {axis.dim_param for value in (*made.input, *made.output) for axis in value.type.tensor_type.shape.dim}
    assert all(name.startswith("run.") for name in open_axes if name)
    assert not [node for node in made.node if node.op_type == "Slice" and node.input[0].startswith("present.")]
