"""`gsx verify --sample`: the graph in parts computes what it computes whole, and a sample finds what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gsx.parity.measure import EngineSide
from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_engines.bundle.bundle import open_bundle, sha256_of
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

MakeBundle = Callable[..., Path]
# Options of the export of the tiny gated model.
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "copied K and V, bfloat16": {"kv_policy": "copy", "precision": "bf16"},
    "states from layer to layer": {"policy": "calm:softmax,threshold=0.05", "budget": None, "calibration": None},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_in_parts_as_whole(make_tiny_bundle: MakeBundle, form: str) -> None:
    """The same values, also of what is captured: both are the same operations."""
    bundle = open_bundle(make_tiny_bundle(**FORMS[form]))
    ids = np.random.default_rng(0).integers(3, 250, (2, 12))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    controls = controls_for(bundle.manifest, KeepSettings())
    whole, parts = (EngineSide(bundle, streamed=one).observe(ids, mask, controls) for one in (False, True))
    for want, have in zip(whole, parts, strict=True):
        assert np.allclose(want.logits, have.logits, atol=1e-5)
        for name in ("states", "keys", "values"):
            pairs = list(zip(getattr(want, name), getattr(have, name), strict=True))
            assert len(pairs) == bundle.manifest.decoder.num_layers
            assert all(np.allclose(one, other, atol=1e-5) for one, other in pairs), name
        assert np.array_equal(want.keep, have.keep)


def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_sample_passes(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(tiny_bundle, tmp_path)
    report = verify(bundle, sample=True, tokens=24)
    assert report.passed, [row for row in report.rows() if row.verdict == "fail"]
    assert report.tokens == 24
    names = {row.name for row in report.rows()}
    assert {"logits, largest error", "states, error over scale", "decisions, wrong"} <= names
    assert not [name for name in names if name.startswith(("fast runner", "greedy", "cache", "left padding"))]
    assert any(note.startswith("A sample: 24 tokens through every layer") for note in report.notes)
    assert json.loads((bundle / "parity.json").read_text())["passed"] is True
    assert "A sample: 24 tokens" in (bundle / "parity.html").read_text()


def test_a_sample_of_experts_that_are_nearly_equal(tmp_path: Path) -> None:
    """Which of two equal experts a token goes to is left to rounding, in a sample as in a whole verification."""
    model = tiny_checkpoint(tmp_path / "model", "qwen3_moe", layers=2, tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    for name, router in tensors.items():
        if name.endswith("mlp.gate.weight"):
            router[1] = router[0] + 1e-4 * router[2]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    bundle = export(model, tmp_path / "bundle", precision="fp16")
    report = verify(bundle.directory, sample=True, tokens=128)
    (routing,) = [result.windows.routing for result in report.results]
    assert routing is not None
    assert routing.flips, "some token is at the border between the two"
    assert report.passed, [row for row in report.rows() if row.verdict == "fail"]


def test_gates_that_are_nearly_closed(tmp_path: Path) -> None:
    """A norm behind the branch makes their error large again: ONNX Runtime's Sigmoid would be a tenth off here."""
    model = tiny_checkpoint(
        tmp_path / "model", "olmo2", layers=2, tokenizer=True, gate=GateConfig("scalar", "pre_norm")
    )
    tensors = load_file(model / "model.safetensors")
    for name, bias in tensors.items():
        if name.endswith("_gate.bias"):
            bias -= 14.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    bundle = export(model, tmp_path / "bundle")
    report = verify(bundle.directory, sample=True, tokens=64)
    assert report.passed, [row for row in report.rows() if row.verdict == "fail"]


def test_a_sample_finds_a_wrong_weight(tiny_bundle: Path, tmp_path: Path) -> None:
    """Some values of a matrix, in a bundle whose hash was made right again."""
    bundle = copied(tiny_bundle, tmp_path)
    path = bundle / "weights.bin"
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2 // 4096 * 4096
    raw[middle : middle + 2048] = np.full(512, 0.5, np.float32).tobytes()
    path.write_bytes(raw)
    manifest = json.loads((bundle / "gsx.json").read_text())
    manifest["weights"]["sha256"] = sha256_of(path)
    (bundle / "gsx.json").write_text(json.dumps(manifest))
    assert verify(bundle, sample=True, tokens=24).verdict == "failed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full": True}, "a sample is checked at the exported setting"),
        ({"backend": "torch"}, "a sample is checked at the exported setting"),
        ({"tokens": 3}, "at least 8"),
    ],
)
def test_refused(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verify(tiny_bundle, sample=True, **options)
