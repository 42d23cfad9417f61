"""Rewrites that leave a step fewer nodes: products packed into one, dot products, rotation inside of
attention, and branches of a whole call. Results stay.

On graphs of a few nodes, and on whole bundles against the portable graph.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gsx.workflows.export import export
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.lowering.for_onnxruntime.dots import dot_rows
from gsx_engines.lowering.for_onnxruntime.packed import pack_products
from gsx_engines.lowering.onnxruntime import lower
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_plugins.graph import Graph
from tests.tiny import tiny_checkpoint

WIDTH, ROWS = 64, 3
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, ROWS, WIDTH)).astype(np.float32)
OUTPUTS = {"q": 64, "k": 32, "v": 32}
# A sum in another order, or the reciprocal of a root, differs in float32's last places.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def graph_of(nodes: list[onnx.NodeProto], outputs: list[str], constants: dict[str, np.ndarray]) -> Graph:
    """A graph of x, y [any, WIDTH] float32, and `asked`, one bool."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, WIDTH]) for name in ("x", "y")]
    values.append(helper.make_tensor_value_info("asked", TensorProto.BOOL, []))
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return Graph(helper.make_graph(nodes, "graph", values, results, tensors))


def run(graph: Graph) -> list[np.ndarray]:
    graph.store()
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph.proto, opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {"x": X, "y": Y, "asked": np.array(True)})
    return results


def inside_an_if(nodes: list[onnx.NodeProto], result: str) -> onnx.NodeProto:
    def part(nodes: list[onnx.NodeProto], name: str) -> onnx.GraphProto:
        return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    other = [helper.make_node("ReduceSum", ["x"], ["other"], keepdims=0)]
    return helper.make_node("If", ["asked"], ["out"], then_branch=part(nodes, result), else_branch=part(other, "other"))


def weight(name: str) -> str:
    return f"layers.0.self_attn.{name}_proj.weight"


def float_products() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """With biases."""
    nodes, constants = [], {}
    for name in ("k", "v", "q"):  # the exporter's order
        constants[weight(name)] = RNG.standard_normal((WIDTH, OUTPUTS[name])).astype(np.float32)
        constants[f"{name}.bias"] = RNG.standard_normal(OUTPUTS[name]).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["x", weight(name)], [f"{name}.product"]))
        nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [name]))
    return nodes, constants


def block_products() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Of weights in blocks of 32."""
    nodes, constants = [], {}
    for name, width in OUTPUTS.items():
        constants[weight(name)] = RNG.integers(-127, 127, (WIDTH, width)).astype(np.int8)
        constants[f"{name}.scale"] = RNG.random((WIDTH // 32, width)).astype(np.float32) / 100
        inputs = [weight(name), f"{name}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.weight"], axis=0, block_size=32))
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.weight"], [name]))
    return nodes, constants


def code_products() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Of codes, with scales of rows; the weights' codes are computed when the graph is loaded."""
    constants: dict[str, np.ndarray] = {"step": np.float32(0.02), "middle": np.uint8(128)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "step", "middle"], ["codes"])]
    nodes.append(helper.make_node("ReduceMax", ["y"], ["scales"], keepdims=1))
    for name, width in OUTPUTS.items():
        bits, changed = f"{weight(name)}.bits", f"{weight(name)}.unsigned"
        constants[bits] = RNG.integers(0, 255, (WIDTH, width)).astype(np.uint8)
        constants[f"{name}.scale"] = RNG.random(width).astype(np.float32) / 100
        nodes.insert(0, helper.make_node("BitwiseXor", [bits, "middle"], [changed]))
        inputs = ["codes", changed, "step", f"{name}.scale", "middle", "middle"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [f"{name}.sum"], domain="com.microsoft"))
        nodes.append(helper.make_node("Mul", [f"{name}.sum", "scales"], [name]))
    return nodes, constants


@pytest.mark.parametrize("products", [float_products, block_products, code_products])
def test_attention_has_one_product(
    products: Callable[[], tuple[list[onnx.NodeProto], dict[str, np.ndarray]]],
) -> None:
    """Biases and scales of rows come along, and Q is first."""
    nodes, constants = products()
    graph = graph_of(nodes, list(OUTPUTS), constants)
    before = run(graph)
    assert pack_products(graph) == len(OUTPUTS) - 1
    kinds = Counter(node.op_type for node in graph.nodes)
    assert kinds["MatMul"] + kinds["MatMulIntegerToFloat"] == 1
    (split,) = (node for node in graph.nodes if node.op_type == "Split")
    assert list(split.output) == list(OUTPUTS)
    for found, expected in zip(run(graph), before, strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)
    assert pack_products(graph) == 0


def test_other_products_stay_apart() -> None:
    """Those of another input, those outside of attention, and weights in 4 bits, which ONNX Runtime cannot join."""
    constants = {weight(name): np.ones((WIDTH, WIDTH), np.float32) for name in "qk"}
    constants |= {f"layers.0.mlp.{name}_proj.weight": np.ones((WIDTH, WIDTH), np.float32) for name in ("gate", "up")}
    reads = zip(constants, ("x", "y", "x", "x"), strict=True)
    nodes = [helper.make_node("MatMul", [read, name], [f"{name}.out"]) for name, read in reads]
    assert pack_products(graph_of(nodes, [f"{name}.out" for name in constants], constants)) == 0
    nodes, constants = block_products()
    graph = graph_of(nodes, list(OUTPUTS), {name: constants[name] for name in constants if "scale" in name})
    for name, width in OUTPUTS.items():
        graph.add_tensor(helper.make_tensor(weight(name), TensorProto.INT4, [WIDTH, width], [1] * (WIDTH * width)))
    assert pack_products(graph) == 0


def test_dot_products_of_rows() -> None:
    """In a branch, which is entered for some rows; elsewhere there may be none, for which sums have a wrong shape."""

    def dot(one: str, other: str, out: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Unsqueeze", [one, "first"], [f"{out}.one"]),
            helper.make_node("Unsqueeze", [other, "second"], [f"{out}.other"]),
            helper.make_node("MatMul", [f"{out}.one", f"{out}.other"], [f"{out}.product"]),
            helper.make_node("Squeeze", [f"{out}.product", "second"], [out]),
        ]

    constants = {"first": np.array([1]), "second": np.array([2])}
    both = [*dot("x", "x", "xx"), *dot("x", "y", "xy"), helper.make_node("Sub", ["xx", "xy"], ["then"])]
    graph = graph_of([*dot("x", "y", "outside"), inside_an_if(both, "then")], ["outside", "out"], constants)
    before = run(graph)
    assert dot_rows(graph) == 2
    for found, expected in zip(run(graph), before, strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)


# Products and attention of a dense layer: Q with K and V, output, gate, up, down.
LAYER = {"GroupQueryAttention": 1, "MatMul": 5}


def body_of(bundle: Bundle) -> onnx.GraphProto:
    portable = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    return lower(portable, bundle.manifest, range(bundle.manifest.decoder.num_layers)).body.graph


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """An export of a tiny checkpoint without gates."""

    def make(family: str, policy: str, heads: int = 4) -> Bundle:
        directory = tmp_path_factory.mktemp("bundle")
        export(tiny_checkpoint(directory / "model", family=family, heads=heads), directory / "out", policy=policy)
        return open_bundle(directory / "out")

    return functools.cache(make)


@pytest.mark.parametrize(
    ("family", "heads", "rotation"),
    [("llama", 4, 0), ("qwen2", 4, 0), ("qwen3", 4, 2), ("llama", 8, 2)],
    ids=["llama", "biases", "norms of heads", "heads of 8"],
)
def test_a_dense_layer(family: str, heads: int, rotation: int, bundle_of: Callable[..., Bundle]) -> None:
    """Norms of heads come before the rotation, which then stays outside of attention; so it does for sizes of heads
    that the op does not rotate."""
    bundle = bundle_of(family, "dense", heads)
    layers = bundle.manifest.decoder.num_layers
    kinds = Counter(node.op_type for node in body_of(bundle).node)
    assert {kind: kinds[kind] for kind in LAYER} == {kind: count * layers for kind, count in LAYER.items()}
    assert kinds["RotaryEmbedding"] == rotation * layers
    for batch in (1, 2):
        same_as_portable(bundle, KeepSettings(), batch, prompt=9)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("until", [0, 5, 9], ids=["nothing in full", "a part of a call in full", "the prompt in full"])
def test_sets_of_layers_run_whole_calls(until: int, batch: int, bundle_of: Callable[..., Bundle]) -> None:
    """Also a call of which some tokens run every branch: the runner makes two of it."""
    bundle = bundle_of("llama", "layers")
    inside = [a.g for node in body_of(bundle).node for a in node.attribute if a.name == "then_branch"]
    assert inside
    assert not {node.op_type for graph in inside for node in graph.node} & {"Gather", "ScatterND", "Compress"}
    same_as_portable(bundle, KeepSettings(layers="0,2.mlp"), batch, prompt=until)


def same_as_portable(bundle: Bundle, keep: KeepSettings, batch: int, *, prompt: int) -> None:
    """The lowered graph against the portable one: 9 tokens, 4 more, and 3 steps."""
    ids = np.random.default_rng(1).integers(3, 97, (batch, 16))
    runners: tuple[Runner, ...] = (open_runner(bundle), WholeRunner(PortableStage(bundle)))
    found = []
    for runner in runners:
        cache, controls = runner.new_cache(batch, 16), controls_for(bundle.manifest, keep, [prompt] * batch)
        outputs = [
            runner.step(cache, ids[:, start:stop], controls, logits="all")
            for start, stop in ((0, 9), (9, 13), (13, 14), (14, 15), (15, 16))
        ]
        found.append(outputs)
    for fast, portable in zip(*found, strict=True):
        np.testing.assert_allclose(fast.logits, portable.logits, **CLOSE)
        if portable.kept is not None:
            np.testing.assert_array_equal(fast.kept, portable.kept)
