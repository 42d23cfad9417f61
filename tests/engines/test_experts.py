"""Routed experts in the forms that runtimes run: each expert in an `If` for ONNX Runtime, products of all for TensorRT.

The other rows for TensorRT are in `test_tensorrt_runner.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.lowering.onnxruntime import lower
from gsx_engines.runners.base import Runner
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.graph import Graph
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10; experts are added in different orders too.
LOGITS_ATOL = 5e-5
# The fast runner rounds inputs to 8 bits by block or row, the portable one does not, or by tensor: half of the logits,
# of order 3, must be this close. Some are not: a rounded input may choose another expert.
ROUNDED_INPUTS = 0.15
EXPERTS = 6
KEYS: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "model"
    return tiny_checkpoint(path, "qwen3_moe", gate=GateConfig("scalar"), tokenizer=True, layers=2, **KEYS)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    export(checkpoint, checkpoint.parent / "bundle")
    return open_bundle(checkpoint.parent / "bundle")


def experts_of(graph: Graph) -> list[onnx.NodeProto]:
    return [n for part in graph.parts() for n in part.nodes if n.op_type == "If" and ".experts." in n.name]


def body_of(bundle: Bundle, *, steps: bool = False) -> Graph:
    portable = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    return Graph(lower(portable, bundle.manifest, bundle.manifest.layers_of("model"), steps=steps).body.graph)


@pytest.mark.parametrize("steps", [False, True])
def test_each_expert_has_its_own_weights(bundle: Bundle, steps: bool) -> None:
    graph = body_of(bundle, steps=steps)
    found = experts_of(graph)
    assert len(found) == 2 * EXPERTS
    assert not [n for part in graph.parts() for n in part.nodes if n.op_type == "RoutedExperts"]
    places = set()
    stored = {t.name: t for t in onnx.load(str(bundle.graph_path("model")), load_external_data=False).graph.initializer}
    for node in found:
        weights = graph.branches(node)["then_branch"].constants.values()
        assert [list(w.dims) for w in weights] == [[64, 32], [64, 32], [32, 64]]
        assert all(w.data_location == TensorProto.EXTERNAL for w in weights)
        places |= {(entry.value) for w in weights for entry in w.external_data if entry.key == "offset"}
    assert len(places) == 2 * EXPERTS * 3, "no two experts share weights"
    whole = stored["layers.1.mlp.experts.down_proj"]
    (start,) = (int(entry.value) for entry in whole.external_data if entry.key == "offset")
    assert str(start + (EXPERTS - 1) * 32 * 64 * 4) in places, "the last expert's part"
    assert not [name for name in graph.constants if name.endswith(("gate_proj", "up_proj", "down_proj"))]


def same(runners: list[Runner], atol: float) -> None:
    """A prompt, single tokens and a batch of steps give the same logits in both runners."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 250, (2, 20))
    controls = {"thresholds": np.full((1, 2, 2), 0.45, np.float32)}
    found = []
    for runner in runners:
        cache = runner.new_cache(2, 32)
        prompt = runner.step(cache, ids[:, :16], controls, logits="all").logits
        steps = [runner.step(cache, ids[:, n : n + 1], controls).logits for n in range(16, 20)]
        found.append(np.concatenate([prompt, *steps], axis=1))
    np.testing.assert_allclose(found[0], found[1], atol=atol)


def test_the_fast_runner_gives_the_portable_runner_s_logits(bundle: Bundle) -> None:
    same([WholeRunner(PortableStage(bundle)), WholeRunner(OnnxRuntimeStage(bundle))], LOGITS_ATOL)


@pytest.mark.parametrize(
    ("scheme", "width", "axis"),
    [("int8-weights", 40, 1), ("int8", 64, 0), ("int4", 64, 0)],
)
def test_codes_of_an_expert_are_a_part_of_all_codes(
    tmp_path: Path, tiny_text: Path, scheme: Any, width: int, axis: int
) -> None:
    """In blocks of 32 inputs, or of a width without whole blocks with a scale for each output."""
    keys = {**KEYS, "moe_intermediate_size": width}
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", tokenizer=True, layers=2, **keys)
    text = {} if scheme == "int8-weights" else {"calibration": tiny_text, "calibration_tokens": 512}
    bundle = export(model, tmp_path / "out", quantize=Quantize(scheme, keep_precision=("none",)), **text)
    quantization = bundle.manifest.quantization
    assert quantization is not None
    stacks = {f"layers.{layer}.mlp.experts.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")}
    assert set(quantization.weights_only) == (stacks if scheme == "int8" else set())
    graph = body_of(bundle)
    kind = TensorProto.INT4 if scheme == "int4" else TensorProto.INT8
    for node in experts_of(graph):
        inside = graph.branches(node)["then_branch"]
        made = [n for n in inside.nodes if n.op_type == "DequantizeLinear"]
        assert [inside.constants[n.input[0]].data_type for n in made] == [kind] * 3
        assert [a.i for n in made[-1:] for a in n.attribute if a.name == "axis"] == [axis]
    controls: dict[str, np.ndarray] = {}
    ids = np.random.default_rng(0).integers(3, 250, (1, 24))
    portable, fast = WholeRunner(PortableStage(bundle)), WholeRunner(OnnxRuntimeStage(bundle))
    logits = [runner.step(runner.new_cache(1, 32), ids, controls, logits="all").logits for runner in (portable, fast)]
    assert np.median(np.abs(logits[0] - logits[1])) < ROUNDED_INPUTS
