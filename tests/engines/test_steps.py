"""Engines for steps of one size, beside those for all calls: on a CPU, against the portable runner."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.lowering.for_tensorrt.gates import exact_in_tf32
from gsx_engines.lowering.tensorrt import Lowered, lower
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.graph import Graph
from gsx_plugins.library import STEP_OPS
from tests.engines.cpu_engine import CpuEngine, cpu_engines
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
CAPACITY = 160
BUNDLES: dict[str, dict[str, Any]] = {
    "thresholds": {},
    "ranks": {"select": "rank", "calibration": None},
    "sets": {"policy": "layers:0,2", "budget": None, "calibration": None},
    "copied K and V": {"kv_policy": "copy", "budget": 0.5},
    "16 bits": {"precision": "bf16"},
    "sets in 16 bits": {"policy": "layers:0,2", "budget": None, "calibration": None, "precision": "bf16"},
    "16 bits, copied K and V": {"kv_policy": "copy", "budget": 0.5, "precision": "bf16"},
}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, make_tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(make_tiny_bundle(**BUNDLES[request.param]))


def with_steps(
    bundle: Bundle,
    batch: int,
    *sizes: tuple[int, int],
    plugins: Collection[str],
    config: Mapping[str, str] | None = None,
) -> tuple[TensorRTStage, CpuEngine, list[CpuEngine]]:
    """A stage, its engine for all calls, and those for steps."""
    entry, engines = cpu_engines(bundle, default_profiles(CAPACITY, batch), capacity=CAPACITY, config=config)
    made = [
        cpu_engines(bundle, (), capacity=CAPACITY, step=size, rows=8, plugins=plugins, config=config) for size in sizes
    ]
    steps = [(own, one["model"]) for own, one in made]
    stage = TensorRTStage(bundle.manifest, entry, "model", engines["model"], steps)
    return stage, engines["model"], [engine for _, engine in steps]


@pytest.mark.parametrize("plugins", [(), STEP_OPS], ids=["masks", "plugins"])
@pytest.mark.parametrize("batch", [1, 2])
def test_calls_of_their_size_and_no_others(bundle: Bundle, batch: int, plugins: Collection[str]) -> None:
    """Up to the last column of the buffers, with fewer tokens of a sequence, and logits of all and of the last."""
    stage, general, steps = with_steps(bundle, batch, (batch, 1), (batch, 3), plugins=plugins)
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
    made = lowered(bundle, 2, ()).model.graph
    open_axes = {axis.dim_param for value in (*made.input, *made.output) for axis in value.type.tensor_type.shape.dim}
    assert all(name.startswith("run.") for name in open_axes if name)
    assert not [node for node in made.node if node.op_type == "Slice" and node.input[0].startswith("present.")]


def lowered(bundle: Bundle, tokens: int, plugins: Collection[str]) -> Lowered:
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    size = {"kv_layout": "step", "step": (1, tokens)}
    return lower(model, bundle.manifest, capacity=CAPACITY, rows=tokens, plugins=plugins, **size)


def products(made: Lowered) -> Counter[str]:
    """How often each weight is read, without the layer's number."""
    nodes = [node for node in made.model.graph.node if node.op_type == "MatMul"]
    return Counter(re.sub(r"layers\.\d+\.", "", node.input[1]) for node in nodes)


def test_products_of_skipped_branches_are_plugins(make_tiny_bundle: Callable[..., Path]) -> None:
    """All but K and V, which are computed for every token, the gates and the head."""
    bundle = open_bundle(make_tiny_bundle())
    layers = bundle.manifest.decoder.num_layers
    made = lowered(bundle, 3, STEP_OPS)
    assert made.forms["ThresholdGather"] == made.forms["GatedScatterAdd"] == "predicated"
    ops = Counter(node.op_type for node in made.model.graph.node if node.domain == "gsx")
    assert ops == {"SkipLinear": layers, "SkipGateUp": layers, "SkipLinearAdd": 2 * layers}
    left = products(made)
    assert all(left[f"self_attn.{name}_proj.weight"] == layers for name in "kv")
    assert not [name for name in left if name.startswith("mlp.") or "q_proj" in name or "o_proj" in name]
    masks = lowered(bundle, 3, STEP_OPS[:2])
    assert masks.forms["ThresholdGather"] == "mask", "a library without all of them"
    assert lowered(bundle, 9, STEP_OPS).forms["ThresholdGather"] == "mask", "more rows than the kernels take"


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "qwen2_moe", "granite"])
def test_other_families(tmp_path: Path, tiny_text: Path, family: str) -> None:
    """What is not a plain product stays masked: norms behind a branch, experts, biases, another activation."""
    checkpoint = tiny_checkpoint(tmp_path / "model", family, gate=GateConfig("scalar", "post_norm"), tokenizer=True)
    export(checkpoint, tmp_path / "out", budget=0.6, calibration=tiny_text)
    bundle = open_bundle(tmp_path / "out")
    stays_equal(bundle, STEP_OPS)


def test_scalar_gates_are_sums(tmp_path: Path, tiny_text: Path) -> None:
    """In steps alone: of many tokens a kernel for matrices reads their weights less often."""
    checkpoint = tiny_checkpoint(tmp_path / "model", gate=GateConfig("scalar", "post_norm"), tokenizer=True)
    export(checkpoint, tmp_path / "out", precision="bf16", budget=0.6, calibration=tiny_text)
    bundle = open_bundle(tmp_path / "out")
    for plugins in ((), STEP_OPS):
        assert not [name for name in products(lowered(bundle, 3, plugins)) if "gate.linear" in name]
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    assert lower(model, bundle.manifest, capacity=CAPACITY, rows=64, plugins=()).counts["sum_scalar_gates"] == 0
    stays_equal(bundle, STEP_OPS)


# Of a graph of 16 bits: whether it has gates, and how many of its layers a plugin attends for.
ATTENTION = {
    "gemma2": (True, 3),  # a cap, and windows in every other layer
    "smollm3": (True, 3),  # a layer without RoPE
    "mistral": (False, 3),  # dense, with a window
    "phi3": (False, 3),  # dense, a part of the head turned
}


@pytest.mark.parametrize("family", ATTENTION)
def test_attention(tmp_path: Path, tiny_text: Path, family: str) -> None:
    """RoPE, writing K and V and attention are one plugin, with decisions and without."""
    gated, layers = ATTENTION[family]
    gate = GateConfig("scalar", "post_norm") if gated else None
    checkpoint = tiny_checkpoint(tmp_path / "model", family, gate=gate, tokenizer=True)
    options: dict[str, Any] = {"budget": 0.6, "calibration": tiny_text} if gated else {}
    bundle = export(checkpoint, tmp_path / "out", precision="bf16", **options)
    made = lowered(bundle, 2, STEP_OPS)
    ops = Counter(node.op_type for node in made.model.graph.node)
    assert ops["SkipAttention" if gated else "StepAttention"] == layers
    assert not ops.keys() & {"Attention", "RotaryEmbedding", "TensorScatter"}
    assert made.forms["GatheredAttention" if gated else "FullAttention"] == ("predicated" if gated else "plugin")
    stays_equal(bundle, STEP_OPS)


# Weights of 8 bits in a graph of 16: how they are exported, and the forms that the products of the last layer take.
QUANTIZED: dict[str, tuple[Quantize, str]] = {
    "int8": (Quantize("int8", ("none",)), "Int8"),
    "int8 weights": (Quantize("int8-weights", ("none",)), "Int8"),
    "fp8": (Quantize("fp8", ("none",)), "E4M3"),
}


# ONNX Runtime computes products of codes as the graph writes them.
AS_WRITTEN = {"session.disable_quant_qdq": "1"}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_codes(make_tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Every product of a skipped branch reads the codes themselves, and gives what the graph gives as it is written."""
    quantize, ending = QUANTIZED[kind]
    monkeypatch.setattr("gsx_engines.runners.portable.session_config", lambda manifest: AS_WRITTEN)
    bundle = open_bundle(make_tiny_bundle(precision="bf16", quantize=quantize))
    layers = bundle.manifest.decoder.num_layers
    made = lowered(bundle, 1, STEP_OPS)
    assert made.forms["ThresholdGather"] == made.forms["GatedScatterAdd"] == "predicated"
    ops = Counter(
        node.op_type for node in made.model.graph.node if node.domain == "gsx" and "Gate" not in node.op_type[:4]
    )
    products = {f"SkipLinear{ending}": layers, f"SkipGateUp{ending}": layers, f"SkipLinearAdd{ending}": 2 * layers}
    assert ops == {**products, "SkipAttention": layers}
    constants = {tensor.name: tensor for tensor in made.model.graph.initializer}
    packed = constants["layers.0.mlp.down_proj.weight.packed"]
    plain = next(one for one in portable_constants(bundle) if one.name == "layers.0.mlp.down_proj.weight")
    assert packed.external_data == plain.external_data, "the bytes are those of the bundle's file"
    # An input that another order of summation takes over the border of a code changes logits by part of a step.
    stays_equal(bundle, STEP_OPS, AS_WRITTEN, LOGITS_ATOL if kind == "int8 weights" else 0.02)


def weight_types(made: Lowered) -> set[int]:
    """Of gates."""
    return {tensor.data_type for tensor in made.model.graph.initializer if "_gate.linear.weight" in tensor.name}


def test_vector_gates_of_16_bits(make_tiny_bundle: Callable[..., Path]) -> None:
    """A step reads a gate's weights as they are stored; elsewhere TensorFloat-32 has the same factors."""
    bundle = open_bundle(make_tiny_bundle(precision="bf16"))
    step = lowered(bundle, 1, STEP_OPS)
    gates = [node for node in step.model.graph.node if node.op_type == "GateLinear"]
    assert len(gates) == 2 * bundle.manifest.decoder.num_layers
    assert weight_types(step) == {onnx.TensorProto.BFLOAT16}
    stays_equal(bundle, STEP_OPS)
    for options, exact in (
        ({}, True),
        ({"quantize": QUANTIZED["int8 weights"][0]}, True),
        ({"precision": "fp32"}, False),
    ):
        bundle = open_bundle(make_tiny_bundle(**{"precision": "bf16", **options}))
        model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
        whole = lower(model, bundle.manifest, capacity=CAPACITY, rows=64, plugins=())
        assert exact_in_tf32(Graph(whole.model.graph)) is exact, options


@pytest.mark.parametrize(
    ("scheme", "ending", "atol"), [(None, "", LOGITS_ATOL), ("int8-weights", "Int8", 0.02)], ids=["16 bits", "8 bits"]
)
def test_gates_of_kept_rows(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any, ending: str, atol: float
) -> None:
    """With linear scores a skipped row reads no gate. Of codes, the scales are rounded to the graph's type here."""
    monkeypatch.setattr("gsx_engines.runners.portable.session_config", lambda manifest: AS_WRITTEN)
    gate = GateConfig("vector", score="linear")
    model = tiny_checkpoint(tmp_path / "model", gate=gate, tokenizer=True)
    quantize = Quantize(scheme, ("none",)) if scheme else None
    options = {"budget": 0.6, "calibration": tiny_text, "calibration_tokens": 1024, "quantize": quantize}
    bundle = export(model, tmp_path / "out", precision="bf16", **options)
    layers = bundle.manifest.decoder.num_layers
    ops = Counter(node.op_type for node in lowered(bundle, 2, STEP_OPS).model.graph.node)
    assert ops[f"SkipLinear{ending}"] == layers + 2 * layers, "queries, and both gates"
    assert not ops.keys() & {"GateLinear", "GateLinearInt8"}
    stays_equal(bundle, STEP_OPS, AS_WRITTEN, atol)


def portable_constants(bundle: Bundle) -> Sequence[onnx.TensorProto]:
    return onnx.load(str(bundle.graph_path("model")), load_external_data=False).graph.initializer


def stays_equal(
    bundle: Bundle, plugins: Collection[str], config: Mapping[str, str] | None = None, atol: float = LOGITS_ATOL
) -> None:
    """Steps of one token and of two, in turn."""
    stage, _, steps = with_steps(bundle, 1, (1, 1), (1, 2), plugins=plugins, config=config)
    portable, runner = WholeRunner(PortableStage(bundle)), WholeRunner(stage)
    caches = [one.new_cache(1, CAPACITY) for one in (portable, runner)]
    for token in range(8):
        want, found = (
            one.step(cache, np.array([[9 + token, 80 + token][: 1 + token % 2]]), controls_for(bundle.manifest))
            for one, cache in zip((portable, runner), caches, strict=True)
        )
        np.testing.assert_allclose(found.logits, want.logits, atol=atol)
        np.testing.assert_array_equal(found.kept, want.kept)
    assert [len(engine.calls) for engine in steps] == [4, 4]


def test_attention_of_sets(make_tiny_bundle: Callable[..., Path]) -> None:
    """The plugin attends for the rows that the host decided on; else TensorRT for all of them."""
    bundle = open_bundle(make_tiny_bundle(**BUNDLES["sets in 16 bits"]))
    for plugins, form, op in ((STEP_OPS, "plugin", "StepAttention"), ((), "all", "Attention")):
        made = lowered(bundle, 3, plugins)
        ops = Counter(node.op_type for node in made.model.graph.node)
        assert made.forms["GatheredAttention"] == form
        assert ops[op] == bundle.manifest.decoder.num_layers
        assert bool(ops["TensorScatter"]) is (form == "all")


def test_attention_of_loops(tmp_path: Path) -> None:
    """Visits that may not run attend as sets of layers do; each has the cache and the window of its own number."""
    export(tiny_checkpoint(tmp_path / "model", "ouro", layers=2, tokenizer=True), tmp_path / "out", precision="bf16")
    bundle = open_bundle(tmp_path / "out")
    made = lowered(bundle, 2, STEP_OPS)
    attentions = [node for node in made.model.graph.node if node.op_type == "StepAttention"]
    assert len({node.output[1] for node in attentions}) == len(attentions) == bundle.manifest.decoder.num_layers
    stays_equal(bundle, STEP_OPS)


@pytest.mark.parametrize("options", [{}, {"policy": "layers:0,2"}], ids=["dense", "sets of layers"])
def test_experts(tmp_path: Path, options: dict[str, Any]) -> None:
    """One row goes through its experts alone; where a set of layers may leave the branch without rows, it does not."""
    checkpoint = tiny_checkpoint(tmp_path / "model", "mixtral", tokenizer=True)
    bundle = export(checkpoint, tmp_path / "out", **options)
    stays_equal(bundle, ())
    ops = {token: Counter(node.op_type for node in lowered(bundle, token, ()).model.graph.node) for token in (1, 2)}
    alone = ops[1]["ReduceSum"] != ops[2]["ReduceSum"]
    assert alone is not bool(options)
