"""`verify`: a correct bundle passes, and each kind of fault makes it fail."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from gsx.parity.quality import QualityLimits
from gsx.parity.report import Report
from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.errors import BundleError
from gsx_engines.runners.base import Cache, StepOutput
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import Progress
from tests.tiny import tiny_checkpoint

# `gsx.verify` is the function; this is its module.
MODULE = import_module("gsx.workflows.verify")
TOKENS, GREEDY = 256, 12


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to be worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be changed."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def check(bundle: Path, text: Path, **options: Any) -> Report:
    """A small verification."""
    values = {"tokens": TOKENS, "greedy_tokens": GREEDY, "budgets": (1.0, 0.7), **options}
    return verify(bundle, text=text, **values)


def failed(report: Report) -> set[str]:
    """Names of the checks that fail."""
    return {one.name for one in report.checks if one.verdict == "fail"}


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change gsx.json and update the hashes of the files, as if the exporter had a fault."""
    path = bundle / "gsx.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    for entry in (*manifest["graphs"].values(), manifest["weights"]):
        entry["sha256"] = hashlib.sha256((bundle / entry["file"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


def edit_weight(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one float32 tensor of weights.bin in place."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (tensor,) = (one for one in model.graph.initializer if one.name == name)
    assert tensor.data_type == TensorProto.FLOAT
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    data = bytearray((bundle / "weights.bin").read_bytes())
    values = np.frombuffer(bytes(data[offset : offset + length]), np.float32).reshape(tuple(tensor.dims))
    data[offset : offset + length] = change(values).astype(np.float32).tobytes()
    (bundle / "weights.bin").write_bytes(bytes(data))
    edit_manifest(bundle, lambda manifest: None)


def edit_graph(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change model.onnx."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    edit_manifest(bundle, lambda manifest: None)


def weight_name(bundle: Path, part: str) -> str:
    """The initializer of layer 1 whose name has a part."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (name,) = (one.name for one in model.graph.initializer if one.name.startswith("layers.1.") and part in one.name)
    return str(name)


def test_a_sound_bundle_passes_and_is_reported(copied: Path, tiny_text: Path) -> None:
    stages: list[Progress] = []
    report = check(copied, tiny_text, tokens=1024, budgets=None, on_progress=stages.append)
    assert report.passed
    assert [result.budget for result in report.results] == [1.0, 0.85, 0.7, 0.5]
    # The exported setting is checked on the whole text, and the report says how much of it the others read.
    assert [result.tokens.windows for result in report.results] == [512, 512, 1024, 512]
    assert [result.part for result in report.results] == [True, True, False, True]
    assert any("0.7, as exported" in note and "--full" in note for note in report.notes)
    assert {check.tokens for check in report.checks if check.name == "states, error over scale"} == {512, 1024}
    shares = [stage.share for stage in stages if stage.share is not None]
    assert shares == sorted(shares)
    assert shares[:1] == [0]
    assert 0 < shares[-1] < 1
    assert {row.verdict for row in report.rows()} <= {"pass", "reported"}
    assert stages
    written = json.loads((copied / "parity.json").read_text())
    assert written["passed"] is True
    assert len(written["results"]) == 4
    assert len(written["results"][0]["windows"]["states"]) == 3
    assert written["weights_sha256"] == report.weights_sha256
    page = (copied / "parity.html").read_text()
    assert "Parity holds" in page
    for title in ("Error by layer", "Kept share by layer", "Which token keeps which layer", "Perplexity"):
        assert title in page
    # Self-contained: nothing is fetched from anywhere (SVG's namespaces are names, not addresses).
    assert "<script src" not in page
    assert "<link" not in page
    assert 'src="http' not in page
    assert not list(copied.glob(".*partial"))


def test_everything_is_checked_if_asked(copied: Path, tiny_text: Path) -> None:
    report = check(copied, tiny_text, tokens=1024, budgets=None, full=True)
    assert report.passed
    assert {result.tokens.windows for result in report.results} == {1024}
    assert {result.tokens.compared for result in report.results} == {1024}
    assert {tuple(result.greedy) for result in report.results} == {("fast", "portable")}
    assert not any("--full" in note for note in report.notes)


def test_kept_shares_fall_with_the_budget(copied: Path, tiny_text: Path) -> None:
    report = check(copied, tiny_text, budgets=(1.0, 0.5))
    assert report.results[0].kept_share == 1.0
    assert report.results[1].kept_share is not None
    assert 0.3 < report.results[1].kept_share < 0.7


@pytest.mark.parametrize("part", ["mlp.down_proj.weight", "self_attn.k_proj.weight", "input_layernorm"])
def test_a_wrong_weight_fails_from_its_layer_on(copied: Path, tiny_text: Path, part: str) -> None:
    edit_weight(copied, weight_name(copied, part), lambda w: w * np.float32(1.01))
    report = check(copied, tiny_text, budgets=(1.0,))
    assert not report.passed
    assert "states, error over scale" in failed(report)
    limit = report.tolerances.relative_limit(report.results[0].rounding)
    states = report.results[0].windows.states
    assert states[0].max_relative < limit < states[1].max_relative
    assert "Parity fails" in (copied / "parity.html").read_text()
    assert json.loads((copied / "parity.json").read_text())["passed"] is False


def test_a_weight_that_is_nan_fails(copied: Path, tiny_text: Path) -> None:
    edit_weight(copied, weight_name(copied, "mlp.down_proj.weight"), lambda w: np.full_like(w, np.nan))
    report = check(copied, tiny_text, budgets=(1.0,))
    assert not report.passed
    assert "logits, largest error" in failed(report)
    json.loads((copied / "parity.json").read_text())


def test_a_gate_that_decides_otherwise_fails(copied: Path, tiny_text: Path) -> None:
    edit_weight(copied, weight_name(copied, "mlp_gate.linear.bias"), lambda b: b + np.float32(0.1))
    report = check(copied, tiny_text, budgets=(0.7,))
    assert "decisions, wrong" in failed(report)
    decisions = report.results[0].windows.decisions
    assert decisions is not None
    first = decisions.wrong[0]
    assert (first.place.layer, first.place.branch) == (1, "mlp")
    assert first.margin > report.tolerances.near_tie


def test_thresholds_of_another_layer_fail(copied: Path, tiny_text: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        for constant in model.graph.initializer:
            if constant.name == "layers.1.number":
                constant.CopyFrom(numpy_helper.from_array(np.array(2, np.int64), constant.name))

    edit_graph(copied, swap)
    report = check(copied, tiny_text, budgets=(0.7,))
    assert "decisions, wrong" in failed(report)
    assert check(copied, tiny_text, budgets=(1.0,)).passed  # where all thresholds are alike


def test_a_default_that_is_not_the_exported_one_fails(copied: Path, tiny_text: Path) -> None:
    def loosen(model: onnx.ModelProto) -> None:
        for constant in model.graph.initializer:
            if constant.name == "thresholds":
                other = numpy_helper.to_array(constant) - np.float32(0.01)
                constant.CopyFrom(numpy_helper.from_array(other, constant.name))

    edit_graph(copied, loosen)
    assert failed(check(copied, tiny_text, budgets=(0.7,))) == {"default selection, wrong"}


def test_a_mask_that_ignores_padding_fails_only_with_padding(copied: Path, tiny_text: Path) -> None:
    def see_padding(model: onnx.ModelProto) -> None:
        # Every reader of the attention mask except the first one sees ones.
        ones = onnx.helper.make_node("Max", ["attention_mask", "one"], ["seen_mask"], name="seen_mask")
        for node in model.graph.node:
            node.input[:] = ["seen_mask" if name == "attention_mask" else name for name in node.input]
        model.graph.node.insert(0, ones)
        model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))

    edit_graph(copied, see_padding)
    names = failed(check(copied, tiny_text, budgets=(1.0,)))
    assert names
    assert all(name.startswith("left padding") for name in names)


class _Babbler(WholeRunner):
    """A runner whose seventh decode step goes wrong."""

    steps = 0

    def step(self, cache: Cache, input_ids: np.ndarray, controls: RuntimeValues, **options: Any) -> StepOutput:
        output = super().step(cache, input_ids, controls, **options)
        if input_ids.shape[1] == 1:
            self.steps += 1
            if self.steps == 7:
                output.logits[0, -1, 5] = 100.0
        return output


def test_a_wrong_token_of_the_fast_runner_fails(copied: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_babbler(bundle: Bundle, threads: int | None = None, **_options: Any) -> _Babbler:
        return _Babbler(OnnxRuntimeStage(bundle, threads=threads))

    monkeypatch.setattr("gsx.parity.run.open_runner", open_babbler)
    report = check(copied, tiny_text, budgets=(1.0,))
    assert failed(report) == {"greedy tokens, fast runner"}
    (mismatch,) = report.results[0].greedy["fast"].mismatches
    assert (mismatch.position, mismatch.engine_token) == (7, 5)
    assert mismatch.margin > 0


def test_another_checkpoint_is_refused(copied: Path, tiny_text: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", gate=GateConfig(), tokenizer=True, seed=1)
    with pytest.raises(BundleError) as error:
        check(copied, tiny_text, reference=str(other))
    source = json.loads((copied / "gsx.json").read_text())["source"]
    assert source["weights_sha256"][:12] in error.value.message
    assert str(other) in error.value.message
    assert "--reference" in error.value.message
    assert not (copied / "parity.json").exists()


def test_a_reference_that_is_gone_is_asked_for(copied: Path, tiny_text: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["source"].update(model="/nowhere/model"))
    with pytest.raises(CheckpointError, match="--reference"):
        check(copied, tiny_text)


def test_changed_weights_are_refused(copied: Path, tiny_text: Path) -> None:
    data = bytearray((copied / "weights.bin").read_bytes())
    data[1000] ^= 1
    (copied / "weights.bin").write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"weights\.bin does not match"):
        check(copied, tiny_text)


def test_budgets_below_the_grid_are_left_out_with_a_note(copied: Path, tiny_text: Path) -> None:
    report = check(copied, tiny_text, budgets=(1.0, 0.01))
    assert [result.budget for result in report.results] == [1.0]
    assert any("0.01" in note for note in report.notes)
    with pytest.raises(UsageError, match="no budget to verify at"):
        check(copied, tiny_text, budgets=(0.01,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 10}, "tokens to verify on"),
        ({"greedy_tokens": 0}, "greedy tokens"),
        ({"budgets": (1.5,)}, "budget"),
        ({"budgets": (float("nan"),)}, "budget"),
    ],
)
def test_unusable_options_are_refused(copied: Path, tiny_text: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(copied, tiny_text, **options)


def test_a_text_that_is_too_short_is_refused(copied: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(TextError, match="too short"):
        check(copied, short)


def test_rank_selection_is_compared_in_whole_calls(
    make_tiny_bundle: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    made = make_tiny_bundle(select="rank", calibration=None)
    bundle = Path(shutil.copytree(made, tmp_path / "rank"))
    report = check(bundle, tiny_text, budgets=(1.0, 0.5))
    assert report.passed
    assert any("rank selection" in note for note in report.notes)
    assert all(result.single_steps is None for result in report.results)
    assert report.results[1].kept_share == pytest.approx(0.5, abs=0.01)


def test_half_precision_has_limits_of_its_own(
    make_tiny_bundle: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(make_tiny_bundle(precision="fp16"), tmp_path / "fp16"))
    report = check(bundle, tiny_text)
    assert report.passed, failed(report)
    tokens = [one for one in report.checks if one.name.startswith("greedy")]
    assert {one.verdict for one in tokens} == {"reported"}
    quality = [one for one in report.checks if one.interval is not None]
    assert {one.verdict for one in quality} == {"reported"}, "random weights cannot be judged; their numbers are"
    judged = replace(report, results=tuple(replace(result, frequency_nats=99.0) for result in report.results))
    assert "next-token distribution, KL divergence in nats" in failed(judged), (
        "a model that can be judged is held to it"
    )
    limited = replace(
        report, limits_given=QualityLimits(divergence=1e-9), quality_limits=QualityLimits(divergence=1e-9)
    )
    assert failed(limited) == {name for name in failed(judged) if "KL" in name}, "and so is one if the user says so"


@pytest.mark.parametrize(("stored", "limits"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")], ids=str)
def test_bfloat16_is_computed_in_float32(tmp_path: Path, tiny_text: Path, stored: torch.dtype, limits: str) -> None:
    """Rounded weights have limits of their own; a checkpoint that is bfloat16 itself is held to float32's."""
    model = tiny_checkpoint(tmp_path / "model", gate=GateConfig("scalar"), tokenizer=True, dtype=stored)
    bundle = export(model, tmp_path / "bundle", precision="bf16", budget=0.7, calibration=tiny_text, draft="exit:1")
    report = check(bundle.directory, tiny_text)
    assert report.passed, failed(report)
    assert report.limits_of == limits
    assert "computed in float32" in report.notes[0]
    with pytest.raises(UsageError, match=r"--backend torch: rounding to bfloat16.*\n.*found bf16\n  without --backend"):
        check(bundle.directory, tiny_text, backend="torch")


def test_a_dense_model_has_one_budget(tmp_path: Path, tiny_text: Path) -> None:
    export(tiny_checkpoint(tmp_path / "dense", "qwen3", tokenizer=True), tmp_path / "bundle")
    report = check(tmp_path / "bundle", tiny_text)
    assert report.passed
    assert [result.budget for result in report.results] == [1.0]
    assert report.results[0].windows.decisions is None
    assert report.keep_map is None
    assert any("no gates" in note for note in report.notes)


def test_an_interruption_leaves_the_old_report(copied: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "parity.json").write_text("old")

    def interrupt(report: Report) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, "page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check(copied, tiny_text, budgets=(1.0,))
    assert (copied / "parity.json").read_text() == "old"
    assert not list(copied.glob(".*partial"))
