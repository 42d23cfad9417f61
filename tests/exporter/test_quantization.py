"""Quantized graphs: scales, what stays in high precision, and that the graph matches the simulation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from benchmarks.model import configuration
from gsx.workflows.quantization import plan_for
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import expected_tensors
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder import walk as walking
from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig, GateScore
from gsx_exporter.graph.assemble import GraphBuilder, Graphs
from gsx_exporter.quantization import choose
from gsx_exporter.quantization.choose import choose_codes
from gsx_exporter.quantization.chosen import ChosenCodes
from gsx_exporter.quantization.plan import Matrix, QuantizationPlan, make_plan, matrices_of, named
from gsx_exporter.quantization.qdq import quantize_graphs
from gsx_exporter.quantization.scheme import (
    E4M3,
    GROUPS,
    INT4,
    INT8,
    INT8_BLOCKS,
    SCHEMES,
    SchemeName,
)
from gsx_exporter.quantization.sensitivity import ranking, spare
from gsx_exporter.quantization.simulate import Cost, Simulation
from gsx_exporter.quantization.smoothing import smooth
from gsx_exporter.quantization.watch import statistics
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.text import TokenText
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import Progress, silent
from tests.tiny import EOS_ID, tiny_checkpoint

LAYERS, HIDDEN = 2, 32
LINEARS = tuple(name for names in GROUPS.values() for name in names)
FIRST = [f"layers.0.{name}" for name in ("attn_gate.linear", "mlp_gate.linear", *LINEARS)]
OPTIONS = DecoderOptions(GateSkip(GateConfig(), (EOS_ID,)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("m") / "tiny"
    return open_checkpoint(tiny_checkpoint(path, gate=GateConfig(), layers=LAYERS, hidden=HIDDEN, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def text() -> TokenText:
    return TokenText(np.random.default_rng(0).integers(3, 97, (2, 48)), "0" * 64, "random ids")


def thresholds(value: float) -> RuntimeValues:
    return {"thresholds": np.full((1, LAYERS, 2), value, np.float32)}


@pytest.fixture(scope="module")
def plan(model: Checkpoint, text: TokenText) -> QuantizationPlan:
    found = statistics(model, text.ids, [thresholds(0.5)], OPTIONS, text_sha256=text.sha256)
    return make_plan(model, SCHEMES["int8"], found[0])


def graph_of(plan: QuantizationPlan, dtype: torch.dtype = torch.float32) -> Graphs:
    options = dataclasses.replace(OPTIONS, dtype=dtype)
    graphs = GraphBuilder(plan.checkpoint, options, thresholds(0.5)).graphs(None)
    return quantize_graphs(graphs, plan, dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_of_a_layer_and_of_the_tables_are_the_whole(
    tmp_path: Path, text: TokenText, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the MLP, rows of the head and windows at a time change nothing: logits, codes and losses."""
    model = open_checkpoint(tiny_checkpoint(tmp_path / "model", layers=LAYERS, hidden=HIDDEN, tied=tied))
    controls: RuntimeValues = {}
    options = DecoderOptions()
    layers: list[DecoderLayer] = []

    def run(folder: str) -> tuple[torch.Tensor, dict[str, float], list[torch.Tensor]]:
        with torch.inference_mode():
            walk = Walk(model, text.ids, options)
            stream = walk.stream(controls)
            for number, layer in walk.layers():
                walk.through(number, layer, stream)
                layers.append(layer)
            logits = torch.cat([found for _, found in walk.logits(stream)])
        (tmp_path / folder).mkdir()
        plan = make_plan(model, SCHEMES["fp8"], statistics(model, text.ids, [controls], options, text_sha256="")[0])
        plan = dataclasses.replace(plan, chosen=ChosenCodes(tmp_path / folder))
        losses = dict(choose_codes(plan, text.ids, controls, options))
        found = [plan.chosen.find(name, E4M3) for name in losses]
        return logits, losses, [one.decoded() for one in found if one is not None]

    monkeypatch.setattr(choose, "_SAMPLE_ROWS", 7)
    whole = run("whole")
    for name, size in {"_MLP_ROWS": 5, "_HEAD_WEIGHTS": 10 * HIDDEN, "_LOGITS": 1}.items():
        monkeypatch.setattr(walking, name, size)
    parts = run("parts")
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    assert parts[1].keys() == whole[1].keys()
    assert all(math.isclose(parts[1][name], loss, rel_tol=1e-2) for name, loss in whole[1].items())
    assert len(parts[2]) == len(whole[2]) == LAYERS * len(LINEARS)
    for one, other in zip(parts[2], whole[2], strict=True):  # a code at a tie may go either way
        assert float((one != other).float().mean()) < 0.01
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters()), "one layer at a time"


def test_ranges_are_of_the_rows_that_ran(model: Checkpoint, text: TokenText) -> None:
    """Nothing is kept: Q, output and MLP see no row, K and V see all; and what is kept is a part of all."""
    none, some, every = statistics(
        model,
        text.ids,
        [thresholds(2.0), thresholds(0.5), thresholds(-np.inf)],
        OPTIONS,
        text_sha256=text.sha256,
    )
    for name in LINEARS:
        seen = none.inputs[f"layers.0.{name}"]
        assert seen.any() == (name in ("self_attn.k_proj", "self_attn.v_proj")), name
    q = "layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(every.inputs[q], every.inputs["layers.0.self_attn.k_proj"])
    assert (some.inputs[q] <= every.inputs[q]).all()
    assert (some.inputs[q] < every.inputs[q]).any()


def test_statistics_are_found_again(model: Checkpoint, text: TokenText, tmp_path: Path) -> None:
    def ask(values: list[float]) -> tuple[list[float], int]:
        layers: list[Progress] = []
        found = statistics(
            model,
            text.ids,
            [thresholds(v) for v in values],
            OPTIONS,
            text_sha256=text.sha256,
            cache=tmp_path,
            on_progress=layers.append,
        )
        return [float(one.inputs["layers.1.mlp.down_proj"].sum()) for one in found], len(layers)

    first, walked = ask([0.5, 0.4])
    assert walked == LAYERS
    again, walked = ask([0.4, 0.5])
    assert (again, walked) == (first[::-1], 0), "nothing new: nothing is run"
    _, walked = ask([0.4, 0.45])
    assert walked == LAYERS, "another selection is counted"
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken off")
    assert ask([0.5, 0.4]) == (first, LAYERS), "a damaged file is counted anew"


@pytest.mark.parametrize("score", ["mean", "linear"])
def test_smoothing_changes_no_bit(tmp_path: Path, text: TokenText, score: GateScore) -> None:
    """Powers of two: logits and every decision are the same numbers as before."""
    gate = GateConfig(score=score)
    made = tiny_checkpoint(tmp_path / "model", gate=gate, layers=LAYERS, hidden=HIDDEN, dtype=torch.bfloat16)
    model, options = open_checkpoint(made), DecoderOptions(GateSkip(gate, (EOS_ID,)))
    found = statistics(model, text.ids, [thresholds(0.5)], options, text_sha256=text.sha256)[0]
    smoothed, inputs = smooth(model, found, 0.8)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(smoothed.parameter(norm), model.parameter(norm)), "something was smoothed"
    results = []
    with torch.inference_mode():
        for checkpoint in (model, smoothed):
            walk = Walk(checkpoint, text.ids, options)
            stream = walk.stream(thresholds(0.5))
            keep = [walk.through(number, layer, stream) for number, layer in walk.layers()]
            results.append((keep, torch.cat([logits for _, logits in walk.logits(stream)])))
    (keep, logits), (smoothed_keep, smoothed_logits) = results
    assert torch.equal(logits, smoothed_logits)
    assert all(torch.equal(a[b], s[b]) for a, s in zip(keep, smoothed_keep, strict=True) for b in a)
    again = statistics(smoothed, text.ids, [thresholds(0.5)], options, text_sha256=text.sha256)[0]
    for name, sizes in inputs.items():
        np.testing.assert_array_equal(again.inputs[name], sizes, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graph_follows_the_rules_of_fusing(plan: QuantizationPlan, dtype: torch.dtype) -> None:
    graphs = graph_of(plan, dtype)
    graph = graphs.models["model"].graph
    producer = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = {weight.name: weight for weight in graphs.weights}
    every = [node for node in graph.node if node.op_type == "MatMul" and node.input[1].endswith(".dequantized")]
    products = [node for node in every if not node.input[1].endswith("_gate.linear.weight.dequantized")]
    for node in (node for node in every if node not in products):  # what decides runs in float32
        scaled = producer[node.input[1]]
        cast = producer[scaled.input[0]]
        assert (scaled.op_type, cast.op_type) == ("Mul", "Cast")
        assert (weights[cast.input[0]].dtype, weights[scaled.input[1]].dtype) == (torch.int8, torch.float32)
    assert len(every) - len(products) == 2 * LAYERS
    head = products.pop()
    assert head.output[0] == "logits"
    assert producer[head.input[0]].op_type == "RMSNormalization", "the head's input is not quantized"
    assert len(products) == LAYERS * len(LINEARS)
    onnx_type = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    for node in products:
        left, right = (producer[name] for name in node.input)
        assert (left.op_type, right.op_type) == ("DequantizeLinear", "DequantizeLinear")
        codes, scale = right.input[:2]
        assert weights[codes].dtype == torch.int8, "codes feed their DequantizeLinear directly"
        assert weights[scale].dtype == dtype
        quantize = producer[left.input[0]]
        assert list(quantize.input[1:]) == list(left.input[1:])
        assert constants[quantize.input[1]].data_type == onnx_type
        assert onnx.numpy_helper.to_array(constants[quantize.input[2]]) == 0
    q = next(node for node in products if "q_proj" in node.input[1])
    rows = producer[producer[q.input[0]].input[0]].input[0]
    assert producer[rows].op_type == "ThresholdGather", "rows are quantized behind the gather"


def test_what_stays_high_is_stored_in_16_bits(plan: QuantizationPlan) -> None:
    everything, sparing = ({w.name: w.dtype for w in graph_of(one).weights} for one in (plan, plan.sparing_first()))
    # The checkpoint's own 16 bits: nothing is rounded.
    assert sparing["layers.0.attn_gate.linear.weight.stored"] == torch.bfloat16
    assert everything["layers.0.attn_gate.linear.weight"] == sparing["layers.1.mlp_gate.linear.weight"] == torch.int8
    assert everything["layers.0.attn_gate.linear.bias"] == torch.float32
    assert {kind for name, kind in everything.items() if name.endswith("_proj.weight")} == {torch.int8}
    assert (everything["embed_tokens"], everything["embed_tokens_scale"]) == (torch.int8, torch.float32)
    assert everything["lm_head.weight"] == sparing["lm_head.weight"] == torch.int8


@pytest.mark.parametrize(("scheme", "high", "careful"), [("int8", 1, 0), ("int8-weights", 0, 0), ("fp8", 1, 3)])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_a_large_model_takes_half_of_its_16_bits(scheme: SchemeName, high: int, careful: int, gate: str) -> None:
    """What stays in high precision by default, on the shape of 1.1 B parameters, costs at most 3 of 50 percent."""
    config = ModelConfig.from_hf(configuration("1b", gate))
    shapes_alone = Checkpoint(Path(), "", None, config, {})
    scheme_row = SCHEMES[scheme]
    everything = QuantizationPlan(
        scheme_row, shapes_alone, dict.fromkeys(matrices_of(config), Matrix(scheme_row.weights, 1.0))
    )
    plan = everything.sparing_first()
    matrices = (*LINEARS, *(f"{branch}_gate.linear" for branch in BRANCHES if gate == "vector"))
    assert set(plan.kept_high) == {f"layers.{layer}.{name}" for layer in range(high) for name in matrices}
    assert set(plan.weights_only) == {
        f"layers.{layer}.{name}" for layer in range(high, high + careful) for name in LINEARS
    }
    sizes = expected_tensors(config)
    names = {f"model.{name.removesuffix('.linear')}" for name in plan.matrices}
    quantized = [sizes[f"{name}.weight".replace("model.lm_head", "lm_head")] for name in names]
    saved = sum(math.prod(size) - 2 * size[0] for size in quantized)  # a byte each; and 16-bit scales
    assert 1 - saved / (2 * sum(math.prod(size) for size in sizes.values())) < 0.53


@pytest.mark.parametrize(
    ("keep", "options", "kept"),
    [
        ((), OPTIONS, FIRST),
        (("none",), OPTIONS, []),
        (("lm_head",), OPTIONS, [*FIRST, "lm_head"]),
        ((), DecoderOptions(), []),
    ],
)
def test_what_decides_what_stays_in_high_precision(
    model: Checkpoint, text: TokenText, tmp_path: Path, keep: tuple[str, ...], options: DecoderOptions, kept: list[str]
) -> None:
    """Nothing stays in high precision if nothing is decided; names are added."""
    controls = thresholds(0.5) if options.rule else {}
    plan, entry = plan_for(model, options, Quantize("int8", keep), None, controls, text, text, tmp_path, silent)
    assert list(plan.kept_high) == list(entry.kept_high) == kept
    assert entry.measured is not None
    assert entry.measured.verdict == "not judged", "random weights predict nothing"


def test_a_shared_table_is_stored_once(tmp_path: Path) -> None:
    """Codes for both: rows that the embedding reads, and a transposed weight for the head; scales of blocks."""
    path = tiny_checkpoint(tmp_path / "m", layers=LAYERS, hidden=HIDDEN, tied=True)
    plan = make_plan(open_checkpoint(path), SCHEMES["int8-weights"], None)
    assert {n for n in plan.matrices if not n.startswith("layers.")} == {"embed_tokens"}
    graphs = quantize_graphs(GraphBuilder(plan.checkpoint, DecoderOptions(), {}).graphs(None), plan, torch.float32)
    tables = {weight.name: weight.dtype for weight in graphs.weights if "embed" in weight.name or "head" in weight.name}
    assert tables == {"embed_tokens": torch.int8, "embed_tokens_scale": torch.float32}
    readers = [
        (node.op_type, list(node.input)) for node in graphs.models["model"].graph.node if "embed_tokens" in node.input
    ]
    assert readers == [
        ("Gather", ["embed_tokens", "hidden.view"]),
        ("DequantizeLinear", ["embed_tokens", "embed_tokens_scale"]),
    ]
    of_blocks = [
        {a.name: a.i for a in node.attribute}
        for node in graphs.models["model"].graph.node
        if node.op_type == "DequantizeLinear" and node.output[0] in ("hidden", "embed_tokens.dequantized")
    ]
    assert of_blocks == [{"axis": 1, "block_size": 32}] * 2


def test_int4_weights_are_blocks_with_zero_points(tmp_path: Path) -> None:
    """A product whose input is no whole number of blocks has INT8 weights instead."""
    path = tiny_checkpoint(tmp_path / "m", layers=LAYERS, hidden=HIDDEN, intermediate_size=80)
    checkpoint, ids = open_checkpoint(path), np.random.default_rng(0).integers(3, 97, (1, 32))
    (found,) = statistics(checkpoint, ids, [{}], DecoderOptions(), text_sha256="0" * 64)
    plan = make_plan(checkpoint, SCHEMES["int4"], found)
    assert plan.matrices["layers.0.mlp.up_proj"].format == INT4
    assert plan.matrices["layers.0.mlp.down_proj"].format == INT8
    assert plan.matrices["lm_head"].format == plan.matrices["embed_tokens"].format == INT8_BLOCKS
    graphs = quantize_graphs(GraphBuilder(plan.checkpoint, DecoderOptions(), {}).graphs(None), plan, torch.float32)
    weights = {weight.name: weight for weight in graphs.weights}
    assert (
        weights["layers.0.mlp.up_proj.weight"].dtype
        == weights["layers.0.mlp.up_proj.weight_zero_point"].dtype
        == INT4.dtype
    )
    nodes = [node for node in graphs.models["model"].graph.node if "layers.0.mlp.up_proj.weight" in node.input]
    assert [(node.op_type, {a.name: a.i for a in node.attribute}) for node in nodes] == [
        ("DequantizeLinear", {"axis": 0, "block_size": 32})
    ]


def test_a_scalar_gate_is_not_a_matrix(tmp_path: Path) -> None:
    gate = GateConfig(kind="scalar")
    config = open_checkpoint(tiny_checkpoint(tmp_path / "m", gate=gate, layers=LAYERS, hidden=HIDDEN)).config
    assert not [name for name in matrices_of(config) if "_gate." in name]


@pytest.mark.parametrize(("hidden", "blocks"), [(64, 2), (48, 1)], ids=["blocks", "no whole blocks"])
def test_embedding_rows_have_scales_of_their_own(tmp_path: Path, hidden: int, blocks: int) -> None:
    path = tiny_checkpoint(tmp_path / "m", layers=LAYERS, hidden=hidden, gate=GateConfig())
    plan = make_plan(open_checkpoint(path), SCHEMES["int8-weights"], None)
    weights = {weight.name: weight for weight in graph_of(plan).weights}
    table = plan.checkpoint.tensor("model.embed_tokens.weight").float()
    codes, scales = (weights[name].encode for name in ("embed_tokens", "embed_tokens_scale"))
    assert codes is not None
    assert scales is not None
    by_block = scales(table).reshape(len(table), blocks, 1)
    assert codes(table).shape == table.shape
    parts = table.reshape(len(table), blocks, -1)
    error = (codes(table).float().reshape(parts.shape) * by_block - parts).abs()
    assert bool((error <= parts.abs().amax(dim=2, keepdim=True) / 127 * 0.5001).all())


def test_float32_gates_stay_float32(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "m", gate=GateConfig(), layers=LAYERS, hidden=HIDDEN)
    weights_alone = make_plan(open_checkpoint(path), SCHEMES["int8-weights"], None)
    plan = weights_alone.without(["embed_tokens", "layers.0.attn_gate.linear"])
    kinds = {weight.name: weight.dtype for weight in graph_of(plan).weights}
    assert kinds["layers.0.attn_gate.linear.weight"] == torch.float32
    assert kinds["embed_tokens.stored"] == torch.float16


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("layers.0", 9),
        ("layers.*.mlp_gate", 2),
        ("layers.*.mlp.down", 2),
        ("layers.1.self_attn", 4),
        ("layers.1.self_attn.qkv", 3),
        ("lm_head", 1),
        ("*", 20),
    ],
)
def test_layers_have_names(model: Checkpoint, pattern: str, count: int) -> None:
    assert len(named(model.config, [pattern])) == count


def test_a_name_that_names_nothing_is_refused(model: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"no layer is named .layers\.7.") as error:
        named(model.config, ["layers.7"])
    assert "layers.0 to layers.1, each with self_attn.qkv" in error.value.message


def test_activations_that_are_not_finite_are_named(tmp_path: Path, text: TokenText) -> None:
    path = tiny_checkpoint(tmp_path / "m", gate=GateConfig(), layers=LAYERS, hidden=HIDDEN)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj is not finite"):
        statistics(open_checkpoint(path), text.ids, [thresholds(-np.inf)], OPTIONS, text_sha256=text.sha256)


def test_products_that_lose_most_are_spared_first(
    model: Checkpoint, plan: QuantizationPlan, text: TokenText, tmp_path: Path
) -> None:
    """One range is set far too narrow: its group is the first of the ranking, and sparing it is enough."""
    bad = "layers.0.mlp.down_proj"
    scale = plan.matrices[bad].input_scale
    assert scale is not None
    spoilt = dataclasses.replace(
        plan, matrices={**plan.matrices, bad: Matrix(INT8, scale / 100)}, chosen=ChosenCodes(tmp_path)
    )
    losses = choose_codes(spoilt, text.ids, thresholds(0.5), OPTIONS)
    assert losses[bad] > 0.5
    order = ranking(spoilt, losses)
    assert order[0] == "layers.0.mlp.down"
    assert len(order) == 4 * LAYERS, "gates and tables are never spared"
    simulation = Simulation(model, text, thresholds(0.5), OPTIONS)
    limit = divergence(simulation.cost(spoilt)) / 2
    tried = spare(simulation, spoilt, losses, lambda cost: divergence(cost) <= limit)
    assert tried[-1].spared == ("layers.0.mlp.down",)
    assert tried[-1].plan.weights_only == (bad,)
    assert divergence(tried[-1].cost) <= limit, "what it gives was measured"
    everything = spare(simulation, spoilt, losses, lambda cost: False)
    assert len(everything[-1].spared) == len(order), "where nothing is enough, all that can be spared is"


def divergence(cost: Cost) -> float:
    return float(np.concatenate([one.divergence for one in cost.windows]).mean())


def test_a_plan_that_changes_nothing_costs_nothing(model: Checkpoint, plan: QuantizationPlan, text: TokenText) -> None:
    cost = Simulation(model, text, thresholds(0.5), OPTIONS).cost(plan.without(matrices_of(model.config)))
    assert divergence(cost) == cost.flipped == 0
    for window in cost.windows:
        assert not window.differing.any()
        np.testing.assert_array_equal(window.losses, window.reference_losses)


def counting_checkpoint(path: Path) -> Path:
    """A model that can be judged: after token n it expects n + 1, below its width; its layers add a little noise."""
    tiny_checkpoint(path, layers=LAYERS, hidden=HIDDEN)
    tensors = load_file(path / "model.safetensors")
    table = torch.zeros_like(tensors["model.embed_tokens.weight"])
    table[:HIDDEN] = torch.eye(HIDDEN)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = table, table.roll(1, 0).contiguous()
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_limit_that_is_not_met_names_what_was_tried(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(counting_checkpoint(tmp_path / "m"))
    text = TokenText(np.arange(96).reshape(2, 48) % HIDDEN, "0" * 64, "counting")
    wanted = Quantize("fp8", max_divergence=1e-9)
    with pytest.raises(GsxError) as error:
        plan_for(checkpoint, DecoderOptions(), wanted, None, {}, text, text, tmp_path, silent)
    message = error.value.message
    assert message.startswith("--fp8: the requested quality is not met; what loses most: layers.")
    assert "expected KL divergence at most 1e-09 nats, at least 0.93 of next tokens the same" in message
    assert "found 0 groups spared: KL divergence" in message
    assert f"; {4 * LAYERS} groups spared: KL divergence" in message
    assert "--keep-precision none" in message
