"""Quality of quantized bundles: how it is measured, and the limits that make `verify` fail."""

from __future__ import annotations

import html
import json
import math
import re
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

from gsx.parity.estimate import Estimate
from gsx.parity.page import page
from gsx.parity.quality import (
    ACTIVATIONS,
    HALF,
    WEIGHTS,
    QualityCounter,
    QualityLimits,
    default_limits,
    frequency_nats,
)
from gsx.parity.report import Report
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx.workflows.verify import verify
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.manifest import KvCache, Quantization, SchemeName
from gsx_engines.bundle.selection import CalibrationText
from gsx_exporter.errors import CheckpointError
from gsx_exporter.evaluation import next_tokens
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import UsageError
from tests.gsx.command_line import Gsx
from tests.tiny import tiny_checkpoint

WIDE = QualityLimits(1.0, 1.0, 10.0, 0.0)
# The checks of quality.
CHANGE, DIVERGENCE = "perplexity, relative change", "next-token distribution, KL divergence in nats"
FAST_DIVERGENCE, DIFFERING = f"fast runner: {DIVERGENCE}", "next token, share that differs"


def test_quality_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    want, have = rng.standard_normal((2, 5, 7)).astype(np.float32)
    keep = np.ones((3, 2, 5), bool)
    other = keep.copy()
    other[1, 1, :2] = False
    counter = QualityCounter([0, 1])
    ids = rng.integers(0, 7, 5)
    counter.add(next_tokens(ids, want, have), keep != other)
    counter.add_fast(next_tokens(ids, want, want).divergence)
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
    counter = QualityCounter([])
    same = next_tokens(np.arange(5), logits, logits)
    counter.add(same, np.zeros((1, 2, 5), bool))
    counter.add_fast(same.divergence)
    assert (counter.result().divergence, counter.result().top1, counter.result().flipped_share) == (0.0, 1.0, None)


def test_frequencies_need_no_model() -> None:
    assert frequency_nats(np.full(9, 4)) == 0
    assert frequency_nats(np.arange(9)) == pytest.approx(np.log(9))
    assert frequency_nats(np.array([[1, 1], [1, 5]])) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def _products(scheme: SchemeName) -> Quantization:
    return Quantization(scheme=scheme, smoothing=0.0, products=1, kept_high=(), budget=None, calibration=None)


KV_CACHE = KvCache(type="int8", scales=(), calibration=CalibrationText(name="a", sha256="0" * 64, tokens=1))


@pytest.mark.parametrize(
    ("rounded", "limits"),
    [
        ({}, QualityLimits()),
        ({"precision": "fp16"}, HALF),
        ({"precision": "bf16"}, HALF),
        ({"quantization": _products("int8-weights")}, WEIGHTS),
        ({"quantization": _products("int8")}, ACTIVATIONS),
        ({"quantization": _products("fp8"), "precision": "fp16"}, ACTIVATIONS),
        ({"kv_cache": KV_CACHE}, ACTIVATIONS),
        ({"kv_cache": KV_CACHE, "quantization": _products("int8-weights")}, ACTIVATIONS),
    ],
)
def test_limits_by_what_is_rounded(tiny_bundle: Path, rounded: dict[str, Any], limits: QualityLimits) -> None:
    """A limit that the user gives changes only itself."""
    found = default_limits(open_bundle(tiny_bundle).manifest.model_copy(update=rounded))
    assert found == limits
    assert QualityLimits(divergence=1.0).over(found) == replace(limits, divergence=1.0)
    if rounded:
        assert None not in (found.divergence, found.top1, found.perplexity_increase)


@pytest.fixture(scope="module")
def report(
    make_once: Callable[[str, Callable[[Path], Any]], Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Report:
    """A tiny model that has learned its text, so that it has something to lose, with its products in 8 bits."""

    def learn(path: Path) -> None:
        model = tiny_checkpoint(path, "qwen2", tokenizer=True, layers=2, hidden=32)
        learning = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        ids = torch.tensor(tokenizer.encode(tiny_text.read_text(), add_special_tokens=False).ids)
        optimizer = torch.optim.AdamW(learning.parameters(), lr=1e-2)
        for starts in np.random.default_rng(0).integers(0, len(ids) - 64, (25, 8)):
            windows = torch.stack([ids[start : start + 64] for start in starts])
            learning(input_ids=windows, labels=windows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        learning.save_pretrained(model)

    bundle = tmp_path_factory.mktemp("learned") / "bundle"
    model = make_once("learned", learn)
    export(model, bundle, quantize=Quantize("int8", ("none",)), calibration=tiny_text, calibration_tokens=1024)
    return verify(bundle, text=tiny_text, tokens=1024, greedy_tokens=4, quality=WIDE)


def test_a_model_that_predicts_its_text_is_judged(report: Report) -> None:
    assert report.verdict == "passed"
    assert report.doubts == ()
    quality = {check.name: check for check in report.checks if check.interval is not None}
    assert set(quality) == {CHANGE, DIVERGENCE, FAST_DIVERGENCE, DIFFERING}
    assert {check.verdict for check in quality.values()} == {"pass"}
    written = report.to_dict()
    assert written["passed"] is True
    assert written["results"][0]["quality"]["estimates"]["divergence"]["tokens"] == 1024
    assert any(check["interval"] is not None for check in written["checks"])


def _estimate(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 1000)


@pytest.mark.parametrize(
    ("estimates", "judgeable", "verdict", "checks", "doubt"),
    [
        # The whole interval is within the limit, on either side of 0.
        ({"perplexity": _estimate(-0.008, 0.009)}, True, "passed", {}, None),
        # A fall is a change like a rise.
        ({"perplexity": _estimate(-0.15, -0.13)}, True, "failed", {CHANGE: "fail"}, None),
        ({"perplexity": _estimate(0.13, 0.15)}, True, "failed", {CHANGE: "fail"}, None),
        ({"divergence": _estimate(2.3, 2.5)}, True, "failed", {DIVERGENCE: "fail"}, None),
        ({"fast_divergence": _estimate(0.021, 0.022)}, True, "failed", {FAST_DIVERGENCE: "fail"}, None),
        ({"differing": _estimate(0.84, 0.86)}, True, "failed", {DIFFERING: "fail"}, None),
        ({"divergence": _estimate(math.nan, math.nan)}, True, "failed", {DIVERGENCE: "fail"}, None),
        # The measured value is within the limit, and the interval reaches over it, on either side, and is wide.
        (
            {"perplexity": _estimate(-0.02, 0.01), "divergence": _estimate(0.0, 0.03)},
            True,
            "not decided",
            {CHANGE: "too few tokens", DIVERGENCE: "too few tokens"},
            rf"Too few tokens to decide: {CHANGE} and {DIVERGENCE}. .* about 9,000 are needed: use --tokens 11264",
        ),
        # Near the limit, an interval that is narrower than the limit decides.
        ({"divergence": _estimate(0.0198, 0.0201)}, True, "passed", {}, None),
        # Chance is beaten by nobody here: what fails still does, and what holds shows nothing.
        (
            {},
            False,
            "not decided",
            dict.fromkeys((CHANGE, DIVERGENCE, FAST_DIVERGENCE, DIFFERING), "not judged"),
            r"Quality cannot be judged at 1: the model itself.*no better \(perplexity .*\) than the frequencies",
        ),
        (
            {"divergence": _estimate(2.3, 2.5)},
            False,
            "failed",
            {DIVERGENCE: "fail", **dict.fromkeys((CHANGE, FAST_DIVERGENCE, DIFFERING), "not judged")},
            "Quality cannot be judged",
        ),
    ],
)
def test_limits_decide(
    report: Report,
    estimates: dict[str, Estimate],
    judgeable: bool,
    verdict: str,
    checks: dict[str, str],
    doubt: str | None,
) -> None:
    """What is measured, against the default limits: 1 % of perplexity, 0.02 nats, 93 % of next tokens."""
    (result,) = report.results
    good = {name: _estimate(0.001, 0.002) for name in ("perplexity", "divergence", "fast_divergence", "differing")}
    measured = replace(result.quality.estimates, **good | estimates)
    result = replace(result, quality=replace(result.quality, estimates=measured))
    if not judgeable:
        result = replace(result, frequency_nats=result.reference_nats)
    found = replace(report, results=(result,), quality_limits=ACTIVATIONS)
    assert {check.name: check.verdict for check in found.checks if check.verdict not in ("pass", "reported")} == checks
    assert (found.verdict, found.passed) == (verdict, verdict == "passed")
    if doubt is None:
        assert found.doubts == ()
    else:
        assert re.search(doubt, " ".join(found.doubts))
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (written["verdict"], written["doubts"]) == (verdict, list(found.doubts))


@pytest.mark.parametrize(
    ("estimate", "verdict"),
    [
        (_estimate(0.001, 0.002), "pass"),
        (_estimate(0.0, 0.05), "reported"),
        (_estimate(0.015, 0.04), "reported"),  # over the limit, perhaps by chance
        (_estimate(0.025, 0.04), "fail"),
        (_estimate(math.nan, math.nan), "fail"),
    ],
)
def test_a_part_of_the_text_finds_faults_and_does_not_judge(report: Report, estimate: Estimate, verdict: str) -> None:
    (result,) = report.results
    measured = replace(result.quality.estimates, divergence=estimate)
    result = replace(result, quality=replace(result.quality, estimates=measured), part=True)
    found = replace(report, results=(result,), quality_limits=ACTIVATIONS)
    assert {check.verdict for check in found.checks if check.name == DIVERGENCE} == {verdict}


@pytest.mark.parametrize(
    ("limits", "heading"),
    [(ACTIVATIONS, "Quality is not decided"), (replace(ACTIVATIONS, divergence=0.0), "Quality fails")],
)
def test_the_page_shows_what_was_not_decided(report: Report, limits: QualityLimits, heading: str) -> None:
    results = tuple(replace(result, frequency_nats=result.reference_nats) for result in report.results)
    found = replace(report, results=results, quality_limits=limits)
    shown = html.unescape(page(found))
    assert f"<h1>{heading}</h1>" in shown
    assert found.doubts[0] in shown
    assert '<td class="not-judged">not judged</td>' in shown
    assert "95 % interval" in shown


def test_limits_apply_down_to_the_exported_budget(make_tiny_bundle: Callable[..., Path], tiny_text: Path) -> None:
    """On text that nothing was calibrated on. A limit fails on random weights too; a pass would say nothing of them."""
    bundle = make_tiny_bundle(quantize=Quantize("int8", ("none",)))
    limits = replace(WIDE, divergence=1e-9)
    found = verify(bundle, text=tiny_text, tokens=256, greedy_tokens=4, budgets=(0.7, 0.5), quality=limits)
    assert any("calibrated on the first 1,024 tokens" in note for note in found.notes), "quality is held out"
    verdicts = {(check.name, check.setting): check.verdict for check in found.checks if check.interval is not None}
    names = {CHANGE, DIVERGENCE, FAST_DIVERGENCE, DIFFERING, "decisions, share that flipped"}
    failing = {DIVERGENCE, FAST_DIVERGENCE}
    assert verdicts == {
        **{(name, "0.7"): "fail" if name in failing else "not judged" for name in names},
        **{(name, "0.5"): "reported" for name in names},
    }
    assert "Quality cannot be judged at 0.7:" in found.doubts[0]
    assert "Flipped decisions by layer" in (bundle / "parity.html").read_text()


def test_a_fall_of_perplexity_by_chance_does_not_pass(
    gsx: Gsx, tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights whose large keys leave 8 bits no room for what differs between them."""
    monkeypatch.setenv("COLUMNS", "240")
    model = tiny_checkpoint(tmp_path / "model", "qwen2", tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    keys = {name: tensor + 300 for name, tensor in tensors.items() if name.endswith("k_proj.bias")}
    save_file({**tensors, **keys}, model / "model.safetensors", metadata={"format": "pt"})
    bundle = tmp_path / "bundle"
    text = ("--calibration", tiny_text, "--calibration-tokens", 1024)
    assert gsx("export", model, "--kv-cache", "int8", *text, "-o", bundle).code == 0
    found = gsx("verify", bundle, "--text", tiny_text, "--tokens", 1024, "--greedy-tokens", 8)
    assert found.code == 1
    assert "Quality cannot be judged at 1: the model itself" in " ".join(found.out.split())
    assert re.search(rf"{DIVERGENCE}.* fail", found.out)
    assert "FAILED" in found.out
    assert "passed" not in found.out
    assert json.loads(gsx("inspect", bundle, "--json").out)["bundle"]["verdict"] == "failed"


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_limits_are_numbers(value: float) -> None:
    with pytest.raises(UsageError, match="quality limit flipped"):
        QualityLimits(flipped=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_flipped": 0.0}, "max flipped"),
        ({"max_perplexity_increase": float("nan")}, "max perplexity increase"),
        ({"max_divergence": -1.0}, "max divergence"),
        ({"keep_precision": ("layers.0", "none")}, "none cannot be combined with names"),
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
