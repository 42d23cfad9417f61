"""`gsx verify` on bundles with a draft: a correct one passes, and each kind of fault is found by its own check."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gsx.parity.speculation import SAMPLED, reference_probabilities, sampling_fit
from gsx.workflows.verify import verify
from gsx_engines.runners.base import StepOutput
from gsx_engines.sampling import Picker
from gsx_engines.speculation.draft import EarlyExitDraft


@pytest.fixture(scope="module")
def split(make_tiny_bundle: Callable[..., Path]) -> Path:
    return make_tiny_bundle(draft="exit:1")


def failed(bundle: Path, text: Path) -> set[str]:
    report = verify(bundle, text=text, tokens=256, greedy_tokens=4, budgets=(0.7,))
    return {one.name for one in report.checks if one.verdict == "fail"}


def test_a_sound_draft_passes(split: Path, tiny_text: Path) -> None:
    report = verify(split, text=tiny_text, tokens=256, greedy_tokens=4, budgets=(1.0, 0.7))
    assert report.passed
    (row,) = (row for row in report.rows() if row.name.startswith("speculative greedy"))
    assert "exit:1" in row.detail
    names = {check.name for check in report.checks}
    assert {"draft, fast runner: logits", "verify, portable runner: logits"} <= names
    written = json.loads((split / "parity.json").read_text())["results"][0]["speculation"]
    assert written["greedy"]["mismatches"] == []
    assert written["sampling"]["least_p"] > 1e-6


def test_a_wrong_half_is_found(split: Path, tiny_text: Path, tmp_path: Path) -> None:
    """A `verify` graph with another norm: its logits and the text fail, but no check of the whole model."""
    bundle = Path(shutil.copytree(split, tmp_path / "bundle"))
    model = onnx.load(bundle / "verify.onnx", load_external_data=False)
    (norm,) = (one for one in model.graph.initializer if one.name == "norm.weight")
    values = np.linspace(0.2, 2, int(norm.dims[0]), dtype=np.float32)
    norm.CopyFrom(numpy_helper.from_array(values, "norm.weight"))
    (bundle / "verify.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "gsx.json").read_text())
    manifest["graphs"]["verify"]["sha256"] = hashlib.sha256((bundle / "verify.onnx").read_bytes()).hexdigest()
    (bundle / "gsx.json").write_text(json.dumps(manifest))
    names = failed(bundle, tiny_text)
    assert "verify, portable runner: logits" in names
    assert "speculative greedy text, continuations that differ" in names
    assert not any(name.startswith(("greedy", "fast", "logits", "draft, portable")) for name in names)


def test_a_loop_that_believes_its_draft_is_found(split: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification that gives the draft's own opinion changes the text."""
    verify_half = EarlyExitDraft.verify

    def careless(self: EarlyExitDraft, *arguments: Any) -> StepOutput:
        output = verify_half(self, *arguments)
        return StepOutput(np.roll(output.logits, 1, axis=-1), output.kept, output.gated_rows)

    monkeypatch.setattr(EarlyExitDraft, "verify", careless)
    assert "speculative greedy text, continuations that differ" in failed(split, tiny_text)


def test_a_biased_sampler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    fit = sampling_fit(logits, logits)
    assert fit is not None
    assert fit.least_p > 1e-6
    pick = Picker.pick

    def biased(self: Picker, scores: np.ndarray, sequence: int, place: int) -> int:
        return pick(self, scores * np.float32(1.15), sequence, place)  # as if the temperature were 0.7

    monkeypatch.setattr(Picker, "pick", biased)
    found = sampling_fit(logits, logits)
    assert found is not None
    assert found.least_p < 1e-6


def test_reference_probabilities_are_those_of_the_warpers() -> None:
    """Temperature, top-k, top-p as transformers applies them."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList(
        [
            TemperatureLogitsWarper(SAMPLED.temperature),
            TopKLogitsWarper(SAMPLED.top_k),
            TopPLogitsWarper(SAMPLED.top_p),
        ]
    )
    for seed in range(20):
        logits = np.random.default_rng(seed).standard_normal(200).astype(np.float32) * 3
        found = reference_probabilities(logits)
        if found is not None:
            wanted = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None]), -1)
            np.testing.assert_allclose(found, wanted[0].numpy(), atol=1e-6)
