"""Every keep rule on small checkpoints: `gsx verify` passes, K/V are as the policy says, and the work is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.tensor_names import past
from gsx_engines.generation.generate import generate
from gsx_engines.lowering.onnxruntime import lower
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.rule import BranchInput, MaskCall
from gsx_exporter.rules.ffn_skip.calibrate import FfnRegion, calibrate_ffn
from gsx_exporter.rules.ffn_skip.reference import FfnStride
from gsx_exporter.text import tokenize
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

LAYERS = 5


@dataclass(frozen=True)
class Row:
    """A checkpoint and an export of it.

    Args:
        options: of the export; model: of the checkpoint.
        budgets: to verify at; None: the usual ones.
        calibrated: whether the export reads text.
    """

    options: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[float, ...] | None = None
    calibrated: bool = False


ROWS = {
    "layers": Row({"policy": "layers:0-2,4"}, {"family": "qwen3", "exits": (1, 2)}),
    "layers, gated, copy, split": Row(
        {"policy": "layers", "kv_policy": "copy", "draft": "exit:2"}, {"gate": GateConfig("scalar", "pre_norm")}
    ),
    "unified, sliding": Row({"policy": "unified:1.6"}, {"family": "mistral", "sliding_window": 8}),
    "ffn-skip, split": Row(
        {"policy": "ffn-skip:stride=2,layers=1-3", "budget": 0.8, "draft": "exit:2"},
        budgets=(1.0, 0.8),
        calibrated=True,
    ),
    "ffn-skip, gated": Row(
        {"policy": "ffn-skip"},
        {"gate": GateConfig("vector", branches=("mlp",))},
        budgets=(0.75,),
        calibrated=True,
    ),
}


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Callable[[str], Path]:
    """The export of a row, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            row, directory = ROWS[name], tmp_path_factory.mktemp("rule")
            model = tiny_checkpoint(directory / "model", layers=LAYERS, tokenizer=True, **row.model)
            text = {"calibration": tiny_text, "calibration_tokens": 1024} if row.calibrated else {}
            export(model, directory / "out", **{**row.options, **text})
            made[name] = directory / "out"
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_parity(name: str, bundle_of: Callable[[str], Path], tiny_text: Path) -> None:
    greedy = 256 if name == "layers" else 32
    report = verify(bundle_of(name), text=tiny_text, tokens=256, greedy_tokens=greedy, budgets=ROWS[name].budgets)
    assert [check.name for check in report.checks if check.verdict == "fail"] == []
    assert report.passed
    shares = [result.kept_share for result in report.results if result.kept_share is not None]
    assert min(shares) < 1, "something is skipped"


def test_batches_have_a_set_for_each_sequence(bundle_of: Callable[[str], Path]) -> None:
    bundle = open_bundle(bundle_of("layers"))
    prompts = [[5, 60, 61, 7, 8, 9], [61, 7, 33], [7, 8]]
    keeps = [KeepSettings(), KeepSettings(exit=2), KeepSettings(layers="0,2-3.mlp,4")]
    for runner in (open_runner(bundle), WholeRunner(PortableStage(bundle))):
        alone = [
            generate(runner, [prompt], max_new_tokens=12, keep=keep, stop_ids=[]).sequences[0]
            for prompt, keep in zip(prompts, keeps, strict=True)
        ]
        assert generate(runner, prompts, max_new_tokens=12, keep=keeps, stop_ids=[]).sequences == alone


def test_unified_runs_the_prompt_in_full(bundle_of: Callable[[str], Path]) -> None:
    runner = open_runner(open_bundle(bundle_of("unified, sliding")))
    found = generate(runner, [[5, 60, 61, 7]], max_new_tokens=5, stop_ids=[])
    # 4 prompt tokens through 5 layers, 4 new ones through floor(5 / 1.6) = 3, two branches each.
    assert found.stats.kept_rows == 2 * (4 * 5 + 4 * 3)


def kept_kv(bundle: Bundle, keep: KeepSettings) -> np.ndarray:
    """Which layers hold K of a call's tokens, [L] bool."""
    stage = PortableStage(bundle)
    runner = WholeRunner(stage)
    cache = runner.new_cache(1, 8)
    runner.step(cache, np.array([[5, 60, 61]]), controls_for(bundle.manifest, keep))
    return np.array([bool(cache.memory[past(layer, "key")].any()) for layer in range(LAYERS)])


def test_skipped_layers_have_no_k_and_v(bundle_of: Callable[[str], Path]) -> None:
    bundle = open_bundle(bundle_of("layers"))
    assert kept_kv(bundle, KeepSettings(layers="0,2,4.attn")).tolist() == [True, False, True, False, True]
    # If the first half of a layer is skipped, the other one runs without K and V.
    assert kept_kv(bundle, KeepSettings(layers="0,2-4.mlp")).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "inside"),
    [("layers", {"GroupQueryAttention", "MatMul"}), ("ffn-skip, split", {"ScatterND"})],
)
def test_a_skipped_branch_is_not_entered(name: str, inside: set[str], bundle_of: Callable[[str], Path]) -> None:
    """In the graph that ONNX Runtime runs, K and V of skipped layers and a rule's values are inside the `If` too."""
    bundle = open_bundle(bundle_of(name))
    portable = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    body = lower(portable, bundle.manifest, range(LAYERS)).body
    assert not {node.op_type for node in body.graph.node} & inside
    if name == "layers":
        asked = [node.op_type for node in body.graph.node if node.output[0].startswith("layers.")]
        assert asked == ["Split", *(2 * LAYERS * ["If"])], "decided at once; what is not entered is not looked at"
    entered = [a.g for node in body.graph.node for a in node.attribute if a.name == "then_branch"]
    assert len(entered) == LAYERS * len(bundle.manifest.skippable)
    assert inside <= {node.op_type for graph in entered for node in graph.node}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"policy": "gateskip"}, r"(?s)needs gates.*model.layers.\{i\}.attn_gate.weight"),
        ({}, {"policy": "magic"}, "policy 'magic' is not known"),
        ({}, {"policy": "layers:0-9"}, "layers that the model does not have"),
        ({}, {"policy": "layers:one"}, "its parameters"),
        ({}, {"policy": "layers:1-4", "kv_policy": "copy"}, "drops the first layer's attention"),
        ({}, {"policy": "layers", "budget": 0.5}, "--budget and --policy layers exclude each other"),
        ({}, {"policy": "layers", "select": "rank"}, "--select rank and --policy layers exclude each other"),
        ({}, {"policy": "unified"}, "a target speed-up"),
        ({}, {"policy": "unified:3"}, "fewer than two of 5 layers"),
        ({}, {"policy": "unified:0.9"}, "the speed-up is out of range"),
        ({"gate": GateConfig()}, {"policy": "dense"}, "the checkpoint has gates"),
        ({"gate": GateConfig()}, {"kv_policy": "none"}, "for sets of layers"),
        ({}, {"policy": "ffn-skip:stride=0"}, "its parameters"),
        ({}, {"policy": "ffn-skip:layers=0-3"}, r"within 1 to 3"),
        ({}, {"policy": "ffn-skip:stride=1,layers=1-2,threshold=1.5"}, r"threshold=COSINE \(-1 to 1\)"),
        ({}, {"policy": "ffn-skip:stride=1,layers=1-2,threshold=0.9", "budget": 0.8}, "exclude each other"),
        ({}, {"policy": "ffn-skip:threshold=0.9"}, "stride and layers with a threshold"),
        ({}, {"policy": "ffn-skip", "kv_policy": "copy"}, "exclude each other"),
        ({}, {"policy": "ffn-skip", "budget": 0.1}, r"cannot reach budget 0.1\n  expected 0.6 or more"),
        ({"layers": 2}, {"policy": "ffn-skip"}, "3 layers or more"),
        ({}, {"policy": "ffn-skip", "draft": "layers:1.mlp"}, "the draft layers:1.mlp needs gates, or --policy layers"),
    ],
)
def test_policies_that_are_refused(
    tmp_path: Path, model: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = tiny_checkpoint(tmp_path / "model", tokenizer=True, **{"layers": LAYERS, **model})
    with pytest.raises(UsageError, match=message):
        export(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_calibrated_shares_are_those_of_the_graph(tmp_path: Path, tiny_text: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "model", layers=8, tokenizer=True))
    ids = tokenize(checkpoint, tiny_text, max_tokens=512).ids
    found = calibrate_ffn(checkpoint, ids, (0.9, 0.8), 0.75)
    assert [point.budget for point in found.points] == [1.0, 0.9, 0.8, 0.75]
    for point in found.points:
        assert abs(point.kept_share - point.budget) <= 0.01, point.budget
        cold = [layer for layer in range(8) if not found.region.first <= layer <= found.region.last]
        assert (point.kept[cold] == 1).all()
    assert found.similarity.shape == (8,)
    assert ((found.similarity > -1) & (found.similarity < 1)).all()


def unread(load: object) -> NoReturn:
    """A rule that reads no part of a checkpoint."""
    raise AssertionError(load)


def published(change: np.ndarray, region: FfnRegion, threshold: float) -> np.ndarray:
    """The method's own loop for one token (docs/methods.md section 5): which FFNs run, [L] bool."""
    left, ran = 0, []
    for layer, moved in enumerate(change):
        if not region.first <= layer <= region.last:
            ran.append(True)
        elif left > 0:
            left -= 1
            ran.append(False)
        else:
            left = region.stride if moved <= threshold else 0
            ran.append(True)
    return np.array(ran)


@settings(max_examples=60)
@given(st.lists(st.floats(0.01, 0.99), min_size=6, max_size=10), st.integers(1, 4), st.floats(0.02, 0.98), st.data())
def test_the_reference_runs_the_published_loop(
    change: list[float], stride: int, threshold: float, data: st.DataObject
) -> None:
    layers = len(change)
    first = data.draw(st.integers(1, layers - 2))
    region = FfnRegion(first, data.draw(st.integers(first, layers - 2)), stride)
    table = region.thresholds(layers, threshold)
    one = torch.ones(1, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 1, dtype=torch.int64)
    call = MaskCall(zeros, one, ~one, zeros, layers, None, torch.clone, unread)
    masker = FfnStride(table, stride, np.zeros(1, np.int64)).start(call)
    before = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    found = []
    for layer, moved in enumerate(change):
        x = BranchInput(layer, "mlp", before, before, None)
        decision = masker.decide(x)
        found.append(bool(decision.keep))
        cosine = 1 - moved
        after = torch.tensor([[[cosine, (1 - cosine**2) ** 0.5]]], dtype=torch.float64)
        masker.after(x, after, decision)
    near = [abs(c - float(np.float32(threshold))) < 1e-6 for c in change]
    if not any(near):
        assert found == published(np.array(change), region, threshold).tolist()
