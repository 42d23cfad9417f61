"""Linear scores of vector gates: how they are fitted, a checkpoint with them, and parity of an export with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gsx.workflows.export import export
from gsx.workflows.train import train
from gsx.workflows.verify import verify
from gsx_engines.bundle.words import SelectionMode
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.training.linear_scores import _Sums, train_linear_scores
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

LINEAR = GateConfig("vector", score="linear")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), width=st.integers(1, 12), calls=st.integers(1, 4), size=st.floats(0.01, 100))
def test_a_linear_logit_comes_back(seed: int, width: int, calls: int, size: float) -> None:
    """Whatever the size of what it reads, and in however many parts; tokens that nothing decides are not learnt."""
    random = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(width, generator=random) / size / width**0.5, torch.randn((), generator=random)
    sums = _Sums()
    for _ in range(calls):
        x = torch.randn(400, width, generator=random) * size
        forced = torch.rand(400, generator=random) < 0.1
        mean = torch.where(forced, torch.rand(400, generator=random), (x @ weight + bias).sigmoid())
        sums.add(x, mean, forced, 350)
    found, shift = sums.solution()
    # The ridge shrinks by 1e-4 of it; a probability in float32 has its logit to about 1e-5.
    torch.testing.assert_close(found[0] * size, weight * size, atol=2e-3, rtol=2e-3)
    assert float(shift) == pytest.approx(float(bias), abs=2e-3)
    # Held out are 50 tokens a call: one may change sides of the median by rounding.
    assert sums.agreement(found, shift) >= 0.97


def test_a_checkpoint_gets_scores_and_keeps_its_weights(tmp_path: Path, tiny_gated: Path, tiny_text: Path) -> None:
    result = train_linear_scores(tiny_gated, tmp_path / "out", text=tiny_text.parent, tokens=4096)
    layers = open_checkpoint(tiny_gated).config.num_layers
    assert [(one.layer, one.branch) for one in result.scores] == [
        (n, b) for n in range(layers) for b in ("attn", "mlp")
    ]
    # Random gates of a tiny model: far better than a guess, which is 0.5.
    assert min(one.agreement for one in result.scores) > 0.8
    before, after = load_file(tiny_gated / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    names = {
        f"model.layers.{layer}.{branch}_gate_score.{part}"
        for layer in range(layers)
        for branch in ("attn", "mlp")
        for part in ("weight", "bias")
    }
    assert set(after) - set(before) == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["gsx"]["gate"]["score"] == "linear"
    assert config["gsx"]["exits"] == [1, 2], "what else the section says stays"
    # Again: the old ones are neither read nor kept, so the result is the same.
    again = train_linear_scores(tmp_path / "out", tmp_path / "again", text=tiny_text.parent, tokens=4096)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(result.scores, again.scores, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gate", [LINEAR, GateConfig("vector", "pre_norm", ("mlp",), "linear")])
@pytest.mark.parametrize("select", ["threshold", "rank"])
def test_parity(tmp_path: Path, tiny_text: Path, gate: GateConfig, select: SelectionMode) -> None:
    """Every decision is that of the reference, which has the same scores; the gate of kept tokens is the exact one."""
    model = tiny_checkpoint(tmp_path / "model", gate=gate, tokenizer=True)
    text = tiny_text if select == "threshold" else None
    export(model, tmp_path / "out", budget=0.6, select=select, calibration=text, calibration_tokens=1024)
    report = verify(tmp_path / "out", text=tiny_text, tokens=512, greedy_tokens=32)
    assert [check.name for check in report.checks if check.verdict == "fail"] == []
    assert min(result.kept_share for result in report.results if result.kept_share is not None) < 0.8


@pytest.mark.parametrize(
    ("gate", "message"),
    [(None, "a model without gates"), (GateConfig("scalar"), "scalar gates, which cost almost nothing")],
)
def test_models_without_vector_gates_are_refused(tmp_path: Path, gate: GateConfig | None, message: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", gate=gate, tokenizer=True)
    with pytest.raises(UsageError, match=message):
        train_linear_scores(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_they_are_not_trained_on(tmp_path: Path, tiny_text: Path) -> None:
    """Gates that change would leave their scores behind."""
    model = tiny_checkpoint(tmp_path / "model", gate=LINEAR, tokenizer=True)
    with pytest.raises(UsageError, match=r"linear scores[\s\S]*--linear-scores"):
        train(tmp_path / "out", recipe="gateskip", changes={"model": str(model), "data.source": str(tiny_text)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scalar", "gsx.gate.score is linear, and a scalar gate is linear itself"),
        ("missing", r"gates are incomplete[\s\S]*model\.layers\.0\.attn_gate_score\.weight"),
        ("mean", r"attn_gate_score"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path, change: str, message: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", gate=GateConfig() if change == "missing" else LINEAR)
    config = json.loads((model / "config.json").read_text())
    gate = config["gsx"]["gate"]
    gate |= {"scalar": {"kind": "scalar"}, "missing": {"score": "linear"}, "mean": {"score": "mean"}}[change]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)
