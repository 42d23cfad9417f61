"""The assembled graph: names, types and sharing of weights, and that it is self-contained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from gsx.workflows.export import export
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.decoder.ends import Entry, Exit
from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions
from gsx_exporter.decoder.loading import Source, sources
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.graph.assemble import GraphBuilder
from gsx_exporter.graph.weights import Weight, write_weights
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_plugins.progress import Progress
from tests.tiny import tiny_checkpoint


def names(values: object) -> list[str]:
    return [value.name for value in values]


def test_inputs_and_outputs_are_the_contract(tiny_bundle: Path) -> None:
    """docs/design.md, section 6."""
    graph = onnx.load(str(tiny_bundle / "model.onnx"), load_external_data=False).graph
    cache = [f"{i}.{kv}" for i in range(3) for kv in ("key", "value")]
    past = [f"past_key_values.{name}" for name in cache]
    assert names(graph.input) == ["input_ids", "attention_mask", "position_ids", *past, "thresholds"]
    assert names(graph.output) == ["logits", *(f"present.{name}" for name in cache)]


def test_the_file_checks_and_runs_without_this_project(tiny_bundle: Path) -> None:
    """onnx's own checker with shape inference, and a plain session that gets only the ecosystem's usual inputs."""
    path = str(tiny_bundle / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.array([[5, 6, 7]]),
        "attention_mask": np.ones((1, 3), np.int64),
        "position_ids": np.array([[0, 1, 2]]),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    assert "thresholds" not in names(session.get_inputs()), "the exported thresholds are a default"
    assert session.run(["logits"], feeds)[0].shape == (1, 3, 259)


def test_every_custom_node_has_a_body_and_names_its_plugin(tiny_bundle: Path) -> None:
    model = onnx.load(str(tiny_bundle / "model.onnx"), load_external_data=False)
    bodies = {function.name for function in model.functions}
    custom = [node for node in model.graph.node if node.domain == "gsx"]
    assert {node.op_type for node in custom} == bodies
    for node in custom:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"gsx"
        assert attributes["plugin_version"] == b"1"


@pytest.mark.parametrize(("tied", "exit_layer"), [(False, None), (True, None), (True, 1)])
def test_weights_are_stored_once(tmp_path: Path, tied: bool, exit_layer: int | None) -> None:
    path = tiny_checkpoint(tmp_path / "m", gate=GateConfig(), tied=tied)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.gate is not None
    options = DecoderOptions(GateSkip(checkpoint.config.gate, checkpoint.config.eos_ids))
    graphs = GraphBuilder(checkpoint, options, {"thresholds": np.zeros((1, 3, 2), np.float32)}).graphs(exit_layer)
    sources = [weight.source for weight in graphs.weights]
    assert len(sources) == len(set(sources))
    assert set(sources) == set(load_file(path / "model.safetensors"))


@pytest.mark.parametrize(("precision", "onnx_type"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_half_precision_keeps_scores_in_float32(
    tmp_path: Path, tiny_gated: Path, precision: str, onnx_type: str
) -> None:
    text = Path(__file__).parents[2] / "docs" / "design.md"
    bundle = export(tiny_gated, tmp_path / "out", budget=0.7, precision=precision, calibration=text)
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    onnx.checker.check_model(str(bundle.graph_path("model")))
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type).lower() for t in model.graph.initializer}
    gates = {(name.rpartition(".")[2], kind) for name, kind in kinds.items() if "_gate.linear." in name}
    assert gates == {("weight", onnx_type), ("bias", "float")}  # the product of a vector gate is in float32
    assert kinds["layers.0.mlp.up_proj.weight"] == onnx_type
    logits = next(value for value in bundle.manifest.graphs["model"].outputs if value.name == "logits")
    assert logits.type == onnx_type


def test_weights_file_round_trips(tmp_path: Path) -> None:
    """Bytes, transposition and alignment, read back through onnx."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(700, 500), "c": torch.randn(7)}
    plan = [
        Weight("a", "a", True, torch.float32),
        Weight("b", "b", False, torch.float32),
        Weight("c", "c", False, torch.float16),
    ]
    steps: list[Progress] = []
    written = write_weights(
        tmp_path / "w.bin", plan, tensors.__getitem__, lambda name: tensors[name].nbytes, steps.append
    )
    whole = sum(tensor.nbytes for tensor in tensors.values())
    assert steps[-1] == Progress("writing weights", whole, whole, unit="bytes")
    assert written.size_bytes == (tmp_path / "w.bin").stat().st_size
    for weight in plan:
        info = written.initializers[weight.name]
        offset = int({e.key: e.value for e in info.external_data}["offset"])
        assert offset % (4096 if weight.name == "b" else 64) == 0, "a large tensor starts at a page, to be mapped"
        onnx.external_data_helper.load_external_data_for_tensor(info, str(tmp_path))
        expected = tensors[weight.source].to(weight.dtype)
        expected = expected.t() if weight.transpose else expected
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(info), expected.numpy())


@pytest.mark.parametrize(
    ("parameter", "name", "transposed", "dtype"),
    [
        ("embed_tokens", "model.embed_tokens.weight", False, torch.float16),
        ("norm.weight", "model.norm.weight", False, torch.float16),
        ("lm_head.weight", "lm_head.weight", True, torch.float16),
        ("layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.gate_proj.weight", True, torch.float16),
        ("layers.3.mlp_gate.linear.weight", "model.layers.3.mlp_gate.weight", True, torch.float16),
        ("layers.3.attn_gate.linear.bias", "model.layers.3.attn_gate.bias", False, torch.float32),
        ("layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_proj.bias", False, torch.float16),
    ],
)
def test_where_parameters_come_from(
    tmp_path: Path, parameter: str, name: str, transposed: bool, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", "qwen2", gate=GateConfig()))
    options = DecoderOptions(dtype=torch.float16)
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config, options, 0)
        parts = {"layers.3.": layer, "": Exit(checkpoint.config, options.dtype)}
        parts_found = {n: s for prefix, part in parts.items() for n, s in sources(part, prefix).items()}
        parts_found |= sources(Entry(checkpoint.hf_config, checkpoint.config, options), "")
    assert parts_found[parameter] == Source(name, transposed, dtype)
