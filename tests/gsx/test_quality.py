"""Quality of quantized bundles: how it is measured, and the limits that make `verify` fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gsx.parity.closeness import Observation
from gsx.parity.quality import QualityCounter, QualityLimits
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx.workflows.verify import verify
from gsx_exporter.config import GateConfig
from gsx_exporter.errors import CheckpointError
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint


def observation(logits: np.ndarray, keep: np.ndarray) -> Observation:
    return Observation(logits, [], [], [], np.zeros(keep.shape, np.float32), keep)


def test_quality_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    want, have = rng.standard_normal((2, 5, 7)).astype(np.float32)
    keep = np.ones((3, 2, 5), bool)
    other = keep.copy()
    other[1, 1, :2] = False
    counter = QualityCounter([0, 1])
    counter.add(observation(want, keep), observation(have, other))
    found = counter.result()
    p, q = (np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True))) for x in (want, have))
    assert found.divergence == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((want.argmax(-1) == have.argmax(-1)).mean()))
    assert found.flipped_share == pytest.approx(2 / 30)
    assert found.most_flipped == (1, "mlp", pytest.approx(2 / 5))


def test_quality_of_the_same_is_perfect() -> None:
    logits, keep = np.random.default_rng(0).standard_normal((5, 7)), np.ones((1, 2, 5), bool)
    counter = QualityCounter([])
    counter.add(observation(logits, keep), observation(logits, keep))
    assert (counter.result().divergence, counter.result().top1, counter.result().flipped_share) == (0.0, 1.0, None)


def test_limits_decide(make_tiny_bundle: Callable[..., Path], tiny_text: Path) -> None:
    """The same bundle passes within wide limits and fails beyond narrow ones, which name what failed and where."""
    bundle = make_tiny_bundle(quantize=Quantize("int8", ("none",)))

    def run(limits: QualityLimits) -> tuple[bool, set[str]]:
        report = verify(bundle, text=tiny_text, tokens=256, greedy_tokens=4, budgets=(0.7, 0.5), quality=limits)
        assert any("calibrated on the first 1,024 tokens" in note for note in report.notes), "quality is held out"
        failed = {(check.name, check.setting) for check in report.checks if check.verdict == "fail"}
        assert all(setting == "0.7" for _, setting in failed), "below the exported budget quality is reported only"
        return report.passed, {name for name, _ in failed}

    assert run(QualityLimits(1.0, 1.0, 10.0, 0.0)) == (True, set())
    passed, names = run(QualityLimits(1.0, 1.0, 1e-9, 0.0))
    assert (passed, names) == (False, {"next-token distribution, KL divergence in nats"})
    assert "Flipped decisions by layer" in (bundle / "parity.html").read_text()


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_limits_are_numbers(value: float) -> None:
    with pytest.raises(UsageError, match="quality limit flipped"):
        QualityLimits(flipped=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_flipped": 0.0}, "max flipped"),
        ({"max_perplexity_increase": float("nan")}, "max perplexity increase"),
        ({"keep_precision": ("auto", "layers.0")}, "auto or none cannot be combined with names"),
        ({"keep_precision": ("layers.0", "none")}, "auto or none cannot be combined with names"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Quantize("int8", **options)


def test_a_bundle_is_not_a_checkpoint(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a bundle, exported already"):
        export(tiny_bundle, tmp_path / "out", quantize=Quantize("int8"))


@pytest.mark.parametrize("section", ['{"quant_method": "awq"}', '"awq"', None])
def test_a_quantized_checkpoint_is_refused(tmp_path: Path, section: str | None) -> None:
    """By what its configuration says, or by the types of its weights."""
    path = tiny_checkpoint(tmp_path / "m", gate=GateConfig(), tokenizer=True)
    if section is not None:
        config = path / "config.json"
        config.write_text(config.read_text().replace("{", f'{{"quantization_config": {section},', 1))
    else:
        tensors = load_file(path / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="already quantized"):
        export(path, tmp_path / "out", quantize=Quantize("int8"))
    assert not (tmp_path / "out").exists()
