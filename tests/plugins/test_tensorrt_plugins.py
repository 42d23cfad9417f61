"""The plugins in TensorRT-RTX, without a GPU: its parser makes plugin layers, its builder builds engines with them, and
what a plugin refuses fails with the plugin's message. What needs a GPU (loading an
engine, running it) is in tests/engines/test_tensorrt_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from gsx_engines.tensorrt.preload import preload_tensorrt_rtx
from gsx_plugins.domain import DOMAIN, ONNX_OPSET, OPSET_VERSION, node
from gsx_plugins.library import PLUGIN_NAMESPACE, PLUGIN_OPS, PLUGIN_VERSION, STEP_OPS
from gsx_plugins.registry import OPS, register_all

usable = preload_tensorrt_rtx()
rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")

TARGET = rtx.ComputeCapability.SM89
FLOAT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
RTX_TYPES = {"float32": rtx.float32, "float16": rtx.float16, "bfloat16": rtx.bfloat16}
PLUGIN = rtx.LayerType.PLUGIN_V3
H = 64
N = "tokens"


class Messages(rtx.ILogger):  # type: ignore[misc]
    """A logger that keeps errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity in (rtx.ILogger.ERROR, rtx.ILogger.INTERNAL_ERROR):
            self.errors.append(text)


@pytest.fixture(scope="module")
def logger() -> Messages:
    return Messages()


@pytest.fixture
def messages(logger: Messages) -> Messages:
    logger.errors.clear()
    return logger


@pytest.fixture(scope="module")
def registry(plugin_library: Path, logger: Messages) -> Iterator[Any]:
    """TensorRT-RTX's registry with the library in it; removed again, since other tests need the bodies."""
    assert usable, "tensorrt_rtx was imported before preload_tensorrt_rtx(): using a plugin would end the process"
    builder = rtx.Builder(logger)  # a plugin finds TensorRT's logger as long as one is referenced
    found = rtx.get_plugin_registry()
    handle = found.load_library(str(plugin_library))
    yield found
    found.deregister_library(handle)
    del builder


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[object]]],
    outputs: dict[str, tuple[int, list[object]]],
) -> bytes:
    register_all()
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", *values),
        functions=[OPS[name].function() for name in {n.op_type for n in nodes} if name in OPS],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        ir_version=11,
    )
    return model.SerializeToString()


def choose_and_add(op: str, kind: int, gate_width: int) -> bytes:
    """A gated branch that computes nothing: choose rows, and add them again times their gate."""
    limit = "k" if op == "TopKGather" else "threshold"
    nodes = [
        node(OPS[op], ["x", "score", limit], ["rows", "index", "count"], "choose"),
        helper.make_node("Gather", ["gates", "index"], ["gate"], axis=0, name="gate"),
        node(OPS["GatedScatterAdd"], ["x", "rows", "gate", "index"], ["out"], "add"),
    ]
    limits: dict[str, tuple[int, list[object]]] = {"k": (TensorProto.INT64, [1]), "threshold": (TensorProto.FLOAT, [])}
    inputs: dict[str, tuple[int, list[object]]] = {
        "x": (kind, [N, H]),
        "score": (TensorProto.FLOAT, [N]),
        limit: limits[limit],
        "gates": (kind, [N, gate_width]),
    }
    return model_of(
        nodes,
        inputs,
        {"out": (kind, [N, H]), "index": (TensorProto.INT64, ["kept"]), "count": (TensorProto.INT64, [])},
    )


class Parsed:
    """A network that the parser made; the parser owns its weights and so stays alive."""

    def __init__(self, model: bytes | Path, logger: Messages) -> None:
        self.builder = rtx.Builder(logger)
        self.network = self.builder.create_network()
        self.parser = rtx.OnnxParser(self.network, logger)
        self.worked = self.parser.parse_from_file(str(model)) if isinstance(model, Path) else self.parser.parse(model)
        errors = (self.parser.get_error(n) for n in range(self.parser.num_errors))
        self.text = " ".join(f"{error.desc()} (node {error.node_name()})" for error in errors)
        self.layers = [self.network.get_layer(n) for n in range(self.network.num_layers)]

    def plugins(self) -> list[Any]:
        return [layer for layer in self.layers if layer.type == PLUGIN]


def test_registered(registry: Any) -> None:
    found = {c.name for c in registry.all_creators if c.plugin_namespace == PLUGIN_NAMESPACE}
    assert found == {*PLUGIN_OPS, *STEP_OPS}
    for name in (*PLUGIN_OPS, *STEP_OPS):
        assert registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None


@pytest.mark.parametrize("gate_width", [1, H])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("op", ["TopKGather", "ThresholdGather"])
def test_layers_shapes_and_types(registry: Any, messages: Messages, op: str, dtype: str, gate_width: int) -> None:
    parsed = Parsed(choose_and_add(op, FLOAT_TYPES[dtype], gate_width), messages)
    assert parsed.worked, parsed.text
    choose, add = parsed.plugins()
    outputs = [choose.get_output(n) for n in range(choose.num_outputs)]
    assert [tuple(output.shape) for output in outputs] == [(-1, H), (-1,), ()]
    assert [output.dtype for output in outputs] == [RTX_TYPES[dtype], rtx.int64, rtx.int64]
    assert tuple(add.get_output(0).shape) == (-1, H)
    assert add.get_output(0).dtype == RTX_TYPES[dtype]
    assert not messages.errors


def without_attention(path: Path, folder: Path) -> Path:
    """The exported model with attention's body passing the query on: TensorRT-RTX does not import the portable body,
    and what engines put in its place is tested with them (gsx_engines/lowering)."""
    model = onnx.load(path, load_external_data=False)
    (attention,) = (function for function in model.functions if function.name == "GatheredAttention")
    del attention.node[:]
    attention.node.append(helper.make_node("Identity", ["query"], ["rows"]))
    for weights in path.parent.glob("*.bin"):
        (folder / weights.name).symlink_to(weights)
    onnx.save(model, folder / path.name)
    return folder / path.name


@pytest.mark.parametrize(("select", "op"), [("threshold", "ThresholdGather"), ("rank", "TopKGather")])
def test_exported_model(
    registry: Any, messages: Messages, make_tiny_bundle: Callable[..., Path], tmp_path: Path, select: str, op: str
) -> None:
    """Every node of an op with a plugin becomes a plugin layer, and nothing else does."""
    path = without_attention(make_tiny_bundle(select=select) / "model.onnx", tmp_path)
    nodes = [n for n in onnx.load(path, load_external_data=False).graph.node if n.op_type in PLUGIN_OPS]
    assert {n.op_type for n in nodes} == {op, "GatedScatterAdd"}
    parsed = Parsed(path, messages)
    assert parsed.worked, parsed.text
    assert len(parsed.plugins()) == len(nodes)
    width = parsed.plugins()[0].get_input(0).shape[1]
    for layer in parsed.plugins():
        assert tuple(layer.get_output(0).shape) == (-1, width)


# Smallest, best and largest number of tokens: decoding, prefill, a very long prefill.
PROFILES = ((1, 1, 1), (1, 128, 512), (1024, 8192, 65_536))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("op", ["TopKGather", "ThresholdGather"])
def test_engine_with_several_profiles(registry: Any, messages: Messages, op: str, dtype: str) -> None:
    parsed = Parsed(choose_and_add(op, FLOAT_TYPES[dtype], 1), messages)
    config = parsed.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(TARGET, 0)
    for sizes in PROFILES:
        profile = parsed.builder.create_optimization_profile()
        for name, tail in (("x", (H,)), ("score", ()), ("gates", (1,))):
            profile.set_shape(name, *((tokens, *tail) for tokens in sizes))
        config.add_optimization_profile(profile)
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    assert engine is not None, messages.errors
    # The engine names the plugins that it needs when it is loaded.
    content = bytes(engine)
    assert op.encode() in content
    assert b"GatedScatterAdd" in content


def test_fields_round_trip(registry: Any, messages: Messages) -> None:
    """What a plugin writes into an engine recreates it: the numbers of attention; the others write nothing."""
    import numpy as np

    for name in (*PLUGIN_OPS, *STEP_OPS):
        creator = registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE)
        numbers = ["rotate_query", "rotate_key", "scale", "softcap", "window"] if "Attention" in name else []
        assert [field.name for field in creator.field_names] == numbers
        kind = rtx.PluginFieldType.FLOAT32
        fields = [rtx.PluginField(number, np.array([1.5], np.float32), kind) for number in numbers]
        for phase in (rtx.TensorRTPhase.BUILD, rtx.TensorRTPhase.RUNTIME):
            assert creator.create_plugin("node", rtx.PluginFieldCollection(fields), phase) is not None
    assert not messages.errors


def test_unknown_field_is_refused(registry: Any, messages: Messages) -> None:
    import numpy as np

    creator = registry.get_creator("TopKGather", PLUGIN_VERSION, PLUGIN_NAMESPACE)
    fields = rtx.PluginFieldCollection([rtx.PluginField("axis", np.array([1], np.int32), rtx.PluginFieldType.INT32)])
    assert creator.create_plugin("choose", fields, rtx.TensorRTPhase.BUILD) is None
    assert "TopKGather: node choose has a field 'axis', expected no fields" in " ".join(messages.errors)


Inputs = Mapping[str, tuple[int, Sequence[int | str]]]


def one_node(op: str, inputs: Inputs) -> bytes:
    outputs = [name for name, _ in OPS[op].outputs]
    kind = {"rows": TensorProto.FLOAT, "out": TensorProto.FLOAT}
    return model_of(
        [node(OPS[op], list(inputs), outputs, "refused")],
        inputs,
        {name: (kind.get(name, TensorProto.INT64), None) for name in outputs},  # type: ignore[misc]
    )


F32, F16, I64, I32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32
# Name of the case -> op, inputs (type, shape), and what the log says.
REFUSED: dict[str, tuple[str, Inputs, str]] = {
    "score of another type": (
        "ThresholdGather",
        {"x": (F16, [N, H]), "score": (F16, [N]), "threshold": (F32, [])},
        "ThresholdGather: input score is float16, expected float32",
    ),
    "rows of a type that is not a float": (
        "TopKGather",
        {"x": (I32, [N, H]), "score": (F32, [N]), "k": (I64, [1])},
        "TopKGather: input x is int32, expected float32, float16 or bfloat16",
    ),
    "k of another type": (
        "TopKGather",
        {"x": (F32, [N, H]), "score": (F32, [N]), "k": (I32, [1])},
        "TopKGather: input k is int32, expected int64",
    ),
    "rows of two types": (
        "GatedScatterAdd",
        {"residual": (F32, [N, H]), "rows": (F16, ["k", H]), "gate": (F32, ["k", 1]), "index": (I64, ["k"])},
        "GatedScatterAdd: input rows is float16, expected float32",
    ),
    "a batch of rows": (
        "ThresholdGather",
        {"x": (F32, [1, N, H]), "score": (F32, [N]), "threshold": (F32, [])},
        "ThresholdGather: input x has 3 dimensions, expected 2",
    ),
    "two limits": (
        "TopKGather",
        {"x": (F32, [N, H]), "score": (F32, [N]), "k": (I64, [2])},
        "TopKGather: input k: axis 0 has size 2, expected 1",
    ),
    "as many scores as no rows": (
        "ThresholdGather",
        {"x": (F32, [8, H]), "score": (F32, [9]), "threshold": (F32, [])},
        "ThresholdGather: input score: axis 0 has size 9, expected 8",
    ),
    "a gate of another width": (
        "GatedScatterAdd",
        {"residual": (F32, [N, H]), "rows": (F32, ["k", H]), "gate": (F32, ["k", 3]), "index": (I64, ["k"])},
        f"GatedScatterAdd: input gate: axis 1 has size 3, expected 1 or {H}",
    ),
    "rows of another width": (
        "GatedScatterAdd",
        {"residual": (F32, [N, H]), "rows": (F32, ["k", 32]), "gate": (F32, ["k", 1]), "index": (I64, ["k"])},
        f"GatedScatterAdd: input rows: axis 1 has size 32, expected {H}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message(registry: Any, messages: Messages, case: str) -> None:
    """The parser fails, or at the latest the builder, and the log says what was expected."""
    op, inputs, expected = REFUSED[case]
    parsed = Parsed(one_node(op, inputs), messages)
    if parsed.worked:
        config = parsed.builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(TARGET, 0)
        profile = parsed.builder.create_optimization_profile()
        for name, (_, shape) in inputs.items():
            fixed = tuple(4 if isinstance(size, str) else size for size in shape)
            if fixed != tuple(shape):
                profile.set_shape(name, fixed, fixed, fixed)
        config.add_optimization_profile(profile)
        assert parsed.builder.build_serialized_network(parsed.network, config) is None
    assert expected in " ".join(messages.errors) + parsed.text


def test_wrong_number_of_outputs(registry: Any, messages: Messages) -> None:
    """An older ThresholdGather, without its count, is refused, not misread."""
    nodes = [helper.make_node("ThresholdGather", ["x", "score", "threshold"], ["rows", "index"], "old", domain=DOMAIN,
                              plugin_namespace=PLUGIN_NAMESPACE, plugin_version=PLUGIN_VERSION)]  # fmt: skip
    inputs: dict[str, tuple[int, list[object]]] = {
        "x": (F32, [N, H]),
        "score": (F32, [N]),
        "threshold": (F32, []),
    }
    model = model_of(nodes, inputs, {"rows": (F32, ["k", H]), "index": (I64, ["k"])})
    parsed = Parsed(model, messages)
    assert not parsed.worked
