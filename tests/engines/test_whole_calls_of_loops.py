"""Numbers of loops on engines: the host gives the rows of each branch; on a CPU against the portable runner."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.building.build import joined_bytes, weight_bytes, widened_weights
from gsx_engines.building.layer_information import UNKNOWN
from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.words import KvPolicy
from gsx_engines.errors import EngineError
from gsx_engines.lowering import tensorrt
from gsx_engines.lowering.for_tensorrt.shared_weights import join_shared_weights
from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_engines.lowering.products import quantized_products
from gsx_engines.lowering.tensorrt import Lowered, lower
from gsx_engines.runners.whole import WholeRunner
from gsx_plugins.graph import Graph
from tests.engines.cpu_engine import cpu_stages, equal_steps
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10, and what enters later calls by the cache.
LOGITS_ATOL = 3e-4
CAPACITY, BATCH = 96, 3
NONE = onnx.TensorProto()


@pytest.fixture(scope="module", params=["per_loop", "last_loop"])
def looped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp(request.param)
    keys = {"layers": 4, "n_output_layers": 1, "recurrent_kv_cache_mode": request.param}
    return export(tiny_checkpoint(folder / "model", "dory", tokenizer=True, **keys), folder / "bundle")


@pytest.mark.parametrize("loops", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 1, 2)], ids=str)
def test_a_batch(looped: Bundle, loops: tuple[int, ...]) -> None:
    """Prompts of different lengths, then steps; each sequence with a number of its own."""
    profiles = default_profiles(CAPACITY, BATCH)
    stages = cpu_stages(looped, profiles, capacity=CAPACITY, plugins=["ThresholdGather"])
    stage, _ = stages["model"]
    assert stage._entry.graphs["model"].forms["ThresholdGather"] == "rows", "the engine asks for no decision"
    controls = controls_for(looped.manifest, [KeepSettings(loops=count) for count in loops])
    sizes = [(9, 2, 40), (1, 1, 1), (0, 1, 1), (3, 0, 1)]
    assert len(list(equal_steps(looped, stage, controls, sizes, CAPACITY, LOGITS_ATOL))) == len(sizes)


def test_a_prompt_that_must_be_one_call_is_not_split(looped: Bundle) -> None:
    profiles = [one for one in default_profiles(CAPACITY, 1) if one.tokens.most == 1]
    stage, _ = cpu_stages(looped, profiles or default_profiles(CAPACITY, 1), capacity=CAPACITY)["model"]
    most = max(one.tokens.most for one in stage._entry.profiles)
    runner = WholeRunner(stage)
    ids, controls = np.full((1, most + 1), 7), controls_for(looped.manifest, KeepSettings())
    if looped.manifest.depends_on_call:
        with pytest.raises(EngineError, match="loops that share a cache need all tokens in one call"):
            runner.step(runner.new_cache(1, CAPACITY), ids, controls)
    else:
        assert np.isfinite(runner.step(runner.new_cache(1, CAPACITY), ids, controls).logits).all()


def lowered(bundle: Bundle) -> Lowered:
    portable = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    return lower(portable, bundle.manifest, capacity=CAPACITY, rows=64, plugins=["ThresholdGather"])


def test_visits_of_a_layer_read_the_same_joined_weights(looped: Bundle) -> None:
    """What TensorRT would put together by itself, it would store for each order that it finds."""
    made = lowered(looped)
    graph = Graph(made.model.graph)
    parts = [[part.name.split(".")[3] for part in parts] for parts in made.joined.values()]
    attention, mlp = ["q_proj", "k_proj", "v_proj", "gate_proj"], ["gate_proj", "up_proj"]
    assert sorted(parts) == [mlp, mlp, attention, attention], "of both looped layers"
    assert {len(graph.users(name)) for name in made.joined} == {3}
    once = {name for name in graph.constants if name.startswith(("layers.0.", "layers.3.")) and "_proj.weight" in name}
    assert all(len(graph.users(name)) == 1 for name in once), "others stay as they are"
    portable = onnx.load(str(looped.graph_path("model")), load_external_data=False).graph.initializer
    stored = sum(int(entry.value) for one in portable for entry in one.external_data if entry.key == "length")
    assert weight_bytes(made) == stored, "each weight counts once, whether it is joined or not"
    sizes = [math.prod(graph.constants[name].dims) * np.dtype(np.float32).itemsize for name in made.joined]
    assert joined_bytes(made) == sum(sizes)


def test_only_products_of_one_value_at_all_visits_are_joined(tmp_path: Path) -> None:
    """In later loops K and V are of all rows and Q of the kept ones, so they stay apart in the first loop too."""
    model = tiny_checkpoint(tmp_path / "model", "ouro", layers=2, tokenizer=True)
    made = export(model, tmp_path / "bundle", kv_policy="compute")
    graph = Graph(lowered(made).model.graph)
    names = ("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight.joined")
    of_query, of_both = ([graph.producer(node.input[0]) for node in graph.users(name)] for name in names)
    firsts = {made[0].op_type for made in (of_query, of_both) if made[0] is not None}
    assert firsts == {"Max", "RMSNormalization"}
    assert len(of_query) == len(of_both) == 3


def test_codes_of_a_value_that_is_not_rounded() -> None:
    """At the first visit both products read x; later ones do not, so they stay apart: one of them reads Max(x, ..)."""
    nodes = []
    for place, (codes, value) in enumerate([("a", "x"), ("b", "x"), ("a", "y"), ("b", "z")]):
        nodes.append(
            helper.make_node("DequantizeLinear", [codes, f"{codes}_scale"], [f"w{place}"], f"dequantize{place}")
        )
        nodes.append(helper.make_node("MatMul", [value, f"w{place}"], [f"out{place}"], f"product{place}"))
    constants = [
        numpy_helper.from_array(content, f"{codes}{ending}")
        for codes in "ab"
        for content, ending in ((np.ones((4, 4), np.int8), ""), (np.ones(4, np.float16), "_scale"))
    ]
    values = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [1, 4]) for name in names]
        for names in (("x", "y", "z"), [f"out{place}" for place in range(4)])
    ]
    graph = Graph(helper.make_graph(nodes, "visits", *values, constants))
    assert join_shared_weights(graph, cast(Task, SimpleNamespace(joined={}))) == 0
    (again,) = (node for node in graph.nodes if node.op_type == "Max")
    assert graph.constants[again.input[1]].data_type == onnx.TensorProto.FLOAT16
    assert [node.input[0] for node in graph.nodes if node.op_type == "MatMul"] == ["x", again.output[0], "y", "z"]


@pytest.mark.parametrize("kv_policy", ["none", "compute"])
def test_codes_are_joined_too(tmp_path: Path, kv_policy: KvPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joined graph computes what the one in which each product has its own weights does."""
    model = tiny_checkpoint(tmp_path / "model", "ouro", layers=2, tokenizer=True)
    quantize = Quantize("int8", keep_precision=("none",))
    made = export(model, tmp_path / "bundle", kv_policy=kv_policy, quantize=quantize, calibration_tokens=256)
    found = lowered(made)
    joins = {"+".join(part.name.split(".")[3] for part in parts) for parts in found.joined.values()}
    assert joins == {"k_proj+v_proj" if kv_policy == "compute" else "q_proj+k_proj+v_proj", "gate_proj+up_proj"}
    assert {name.split(".")[-2] for name in found.joined} == {"weight", "weight_scale"}
    graph = Graph(found.model.graph)
    assert {len(graph.users(name)) for name in found.joined} == {3}
    products = {product.name: weights.input[0] for product, _, weights in quantized_products(graph)}
    wide = next(name for name, codes in products.items() if "v_proj" in found.joined.get(codes, [NONE])[-1].name)
    types = dict.fromkeys(products, "int8") | {wide: "float16"}
    projections = ["k_proj", "v_proj"] if kv_policy == "compute" else ["q_proj", "k_proj", "v_proj"]
    assert [name.split(".")[3] for name in widened_weights(found, types)] == projections, "names of the bundle"
    assert not widened_weights(found, types | {wide: UNKNOWN}), "a builder that does not say is no sign of it"
    logits = []
    for passes in (tensorrt.PASSES, [one for one in tensorrt.PASSES if one is not join_shared_weights]):
        monkeypatch.setattr(tensorrt, "PASSES", passes)
        stages = cpu_stages(made, default_profiles(CAPACITY, 1), capacity=CAPACITY, plugins=["ThresholdGather"])
        runner = WholeRunner(stages["model"][0])
        ids, controls = np.arange(3, 12)[None], controls_for(made.manifest, KeepSettings(loops=2))
        logits.append(runner.step(runner.new_cache(1, CAPACITY), ids, controls).logits)
    np.testing.assert_allclose(*logits, atol=LOGITS_ATOL)
