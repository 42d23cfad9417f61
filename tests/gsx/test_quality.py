"""Quality of quantized bundles: how it is measured, and the limits that make `verify` fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from gsx.parity.closeness import Observation
from gsx.parity.quality import ACTIVATIONS, QualityCounter, QualityLimits, default_limits, frequency_nats
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx.workflows.verify import verify
from gsx_engines.bundle.bundle import open_bundle
from gsx_exporter.config import GateConfig
from gsx_exporter.errors import CheckpointError
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

WIDE = QualityLimits(1.0, 1.0, 10.0, 0.0)
DIVERGENCE = "next-token distribution, KL divergence in nats"


def observation(logits: np.ndarray, keep: np.ndarray) -> Observation:
    return Observation(logits, [], [], [], np.zeros(keep.shape, np.float32), keep)


def test_quality_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    want, have = rng.standard_normal((2, 5, 7)).astype(np.float32)
    keep = np.ones((3, 2, 5), bool)
    other = keep.copy()
    other[1, 1, :2] = False
    counter = QualityCounter([0, 1])
    ids = rng.integers(0, 7, 5)
    counter.add(ids, observation(want, keep), observation(have, other), want)
    found = counter.result()
    p, q = (np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True))) for x in (want, have))
    assert found.divergence == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((want.argmax(-1) == have.argmax(-1)).mean()))
    assert found.flipped_share == pytest.approx(2 / 30)
    assert found.most_flipped == (1, "mlp", pytest.approx(2 / 5))
    losses = [-np.log(shares[np.arange(4), ids[1:]]).mean() for shares in (p[:-1], q[:-1])]
    estimates = found.estimates
    assert estimates.perplexity.value == pytest.approx(float(np.exp(losses[1] - losses[0])) - 1, rel=1e-4)
    assert estimates.divergence.value == found.divergence
    assert estimates.fast_divergence.value == 0
    assert estimates.differing.value == pytest.approx(1 - found.top1)
    assert estimates.flipped is not None
    assert estimates.flipped.value == pytest.approx(found.flipped_share)


def test_quality_of_the_same_is_perfect() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    keep = np.ones((1, 2, 5), bool)
    counter = QualityCounter([])
    counter.add(np.arange(5), observation(logits, keep), observation(logits, keep), logits)
    assert (counter.result().divergence, counter.result().top1, counter.result().flipped_share) == (0.0, 1.0, None)


def test_frequencies_need_no_model() -> None:
    assert frequency_nats(np.full(9, 4)) == 0
    assert frequency_nats(np.arange(9)) == pytest.approx(np.log(9))
    assert frequency_nats(np.array([[1, 1], [1, 5]])) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def test_limits_by_what_is_rounded(make_tiny_bundle: Callable[..., Path]) -> None:
    """Each by itself, and the widest of two together; a limit of one's own changes only itself."""
    rows: list[tuple[dict[str, Any], QualityLimits]] = [
        ({}, QualityLimits()),
        ({"precision": "fp16"}, QualityLimits(0.01, None, 0.006, 0.93)),
        ({"quantize": Quantize("int8-weights")}, QualityLimits(0.01, 0.01, 0.006, 0.93)),
        ({"quantize": Quantize("int8", ("none",))}, QualityLimits(0.01, 0.01, 0.02, 0.93)),
        ({"kv_cache": "int8"}, QualityLimits(0.01, 0.01, 0.02, 0.93)),
    ]
    for options, limits in rows:
        assert default_limits(open_bundle(make_tiny_bundle(**options)).manifest) == limits, options
    assert QualityLimits(divergence=1.0).over(ACTIVATIONS) == QualityLimits(0.01, 0.01, 1.0, 0.93)


@pytest.fixture(scope="module")
def learned(make_once: Callable[[str, Callable[[Path], Any]], Path], tiny_text: Path) -> Path:
    """A tiny dense model that has seen a text, so that it has something to lose, with its products in 8 bits."""

    def learn(path: Path) -> None:
        model = tiny_checkpoint(path / "model", "qwen2", tokenizer=True, layers=2, hidden=32)
        torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = (
            Tokenizer.from_file(str(model / "tokenizer.json"))
            .encode(tiny_text.read_text(), add_special_tokens=False)
            .ids
        )
        starts = np.random.default_rng(0).integers(0, len(ids) - 64, (30, 8))
        optimizer = torch.optim.AdamW(torch_model.parameters(), lr=1e-2)
        for batch in starts:
            windows = torch.tensor([ids[start : start + 64] for start in batch])
            torch_model(input_ids=windows, labels=windows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch_model.save_pretrained(model)
        values = {"calibration": tiny_text, "calibration_tokens": 1024}
        export(model, path / "bundle", quantize=Quantize("int8", ("none",)), **values)

    return make_once("learned", learn)


@pytest.mark.parametrize(
    ("tokens", "limits", "verdict", "names"),
    [
        (1024, WIDE, "passed", set()),
        (1024, replace(WIDE, divergence=1e-9), "failed", {DIVERGENCE, f"fast runner: {DIVERGENCE}"}),
        (1024, replace(WIDE, top1=1.0), "failed", {"next token, share that differs"}),
        (1024, replace(WIDE, perplexity_increase=0.0), "failed", {"perplexity, relative change"}),
        # Whatever was measured, 256 tokens do not show a tenth of a percent.
        (256, replace(WIDE, top1=0.0, perplexity_increase=None), "passed", set()),
    ],
)
def test_limits_decide(
    learned: Path, tiny_text: Path, tokens: int, limits: QualityLimits, verdict: str, names: set[str]
) -> None:
    """The same bundle passes within wide limits and fails beyond narrow ones, which name what failed."""
    report = verify(learned / "bundle", text=tiny_text, tokens=tokens, greedy_tokens=4, quality=limits)
    assert report.verdict == verdict
    assert {check.name for check in report.checks if check.verdict == "fail"} == names
    assert report.doubts == ()


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
