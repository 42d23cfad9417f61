"""Engines whose K and V grow compute what the bundle's graph does, in its own names: run on a CPU (`cpu_engine.py`)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import pytest

from gsx_engines.building.build import input_ranges
from gsx_engines.building.profiles import parse_profile
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.lowering.tensorrt import lower
from gsx_engines.runners.session import open_session
from tests.engines.cpu_engine import cpu_model

# Two orders of summation of float32 products at logits of order 10.
ATOL = 5e-5
PLUGINS = ("ThresholdGather", "GatedScatterAdd")
Values = dict[str, np.ndarray]


class Client:
    """Another program: keeps K and V between calls, and knows only the graph's names."""

    def __init__(self, bundle: Bundle, model: onnx.ModelProto) -> None:
        selection, shape = bundle.manifest.selection, bundle.manifest.decoder
        assert selection is not None
        self.thresholds = selection.thresholds_for(0.7)[None]
        self.session = open_session(model.SerializeToString(), bundle.directory, 1)
        self.names = [value.name for value in self.session.get_outputs()]
        self.empty = np.zeros((1, shape.num_kv_heads, 0, shape.head_dim), np.float32)

    def call(self, ids: list[int], past: Values, seen: list[int], first: int) -> tuple[np.ndarray, Values]:
        """Logits [1, S, V] and the new K and V.

        Args:
            past: K and V; seen: 1 for each column of it that counts; first: the first token's position.
        """
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.array([[*seen, *[1] * len(ids)]]),
            "position_ids": np.arange(first, first + len(ids))[None],
            "thresholds": self.thresholds,
        }
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                feeds[value.name] = past.get(value.name, self.empty)
        found = dict(zip(self.names, self.session.run(self.names, feeds), strict=True))
        kept = {name.replace("present.", "past_key_values."): array for name, array in found.items() if "." in name}
        return found["logits"], kept


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def lowered(bundle: Bundle, plugins: Collection[str], batch: int) -> onnx.ModelProto:
    graph = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    sizes = {"capacity": 64, "rows": 64}
    made = lower(graph, bundle.manifest, kv_layout="growing", plugins=plugins, **sizes)
    return cpu_model(made, bundle.manifest.decoder)


@pytest.mark.parametrize(("plugins", "batch"), [((), 1), (PLUGINS, 1), (PLUGINS, 2)], ids=["masks", "rows", "batch"])
def test_the_same_numbers_as_the_graph(bundle: Bundle, plugins: Collection[str], batch: int) -> None:
    """A prompt, and tokens after it; also with a first column that the mask hides, instead of no columns."""
    graph = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    plain, engine = Client(bundle, graph), Client(bundle, lowered(bundle, plugins, batch))
    ids = [5, 60, 61, 7, 8, 9, 200, 11]
    expected, kept = plain.call(ids, {}, [], 0)
    next_expected, _ = plain.call([12], kept, [1] * 8, 8)
    found, grown = engine.call(ids, {}, [], 0)
    next_found, _ = engine.call([12], grown, [1] * 8, 8)
    one = {name: np.zeros_like(array[:, :, :1]) for name, array in grown.items()}
    hidden, behind = engine.call(ids, one, [0], 0)
    next_hidden, _ = engine.call([12], behind, [0, *[1] * 8], 8)
    for these in ((expected, found, hidden), (next_expected, next_found, next_hidden)):
        for other in these[1:]:
            np.testing.assert_allclose(other, these[0], rtol=0, atol=ATOL)
    for name, array in kept.items():
        np.testing.assert_allclose(grown[name], array, rtol=0, atol=ATOL)
        np.testing.assert_allclose(behind[name][:, :, 1:], array, rtol=0, atol=ATOL)


def test_ranges_that_fit_together(bundle: Bundle) -> None:
    """At the smallest, usual and largest size of all axes, past and new columns add up to the total."""
    model = lowered(bundle, (), 2)
    for text in ("prompt:2-8-32", "step:1:1-1-4", "any:1-16-64"):
        ranges = input_ranges(model, parse_profile(text, capacity=64, batch=1))
        ids, mask, past = (ranges[name] for name in ("input_ids", "attention_mask", "past_key_values.0.key"))
        assert [before[2] + call[1] for before, call in zip(past, ids, strict=True)] == [total[1] for total in mask]
        assert past[0][2] == 0
        assert past[2][2] + ids[0][1] == 64
