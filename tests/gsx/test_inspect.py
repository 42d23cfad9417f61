"""`gsx inspect`, and that the public API is lazy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gsx
from gsx.cli import run
from gsx_exporter.checkpoint.checkpoint import open_checkpoint
from tests.tiny import tiny_checkpoint


def test_checkpoint(tiny_gated: Path) -> None:
    report = gsx.inspect(tiny_gated)
    checkpoint = open_checkpoint(tiny_gated)
    config = checkpoint.config
    assert report.kind == "checkpoint"
    assert report.shape["layers"] == config.num_layers
    assert report.gates == {"kind": "vector", "input": "post_norm", "branches": ["attn", "mlp"]}
    assert report.exits == (1, 2)
    H = config.hidden_size
    assert report.parameters["gates"] == config.num_layers * 2 * (H * H + H)
    total = sum(checkpoint.tensor(name).numel() for name in checkpoint.names)
    assert sum(report.parameters.values()) == total
    assert report.types == ("f32",)
    assert "model.safetensors" in report.files


def test_bundle(tiny_bundle: Path, tiny_gated: Path) -> None:
    report = gsx.inspect(tiny_bundle)
    assert report.kind == "bundle"
    assert report.parameters == gsx.inspect(tiny_gated).parameters
    assert report.exits == (1, 2)
    assert report.bundle is not None
    assert report.bundle["budget"] == 0.7
    assert report.bundle["parity"] is None
    assert (report.bundle["draft"], report.bundle["quantization"], report.bundle["engines"]) == (None, None, {})
    for point in report.bundle["grid"]:
        assert abs(point["kept_share"] - point["budget"]) <= 0.02
    json.dumps(report.to_dict())


def test_dense_model(tmp_path: Path) -> None:
    report = gsx.inspect(tiny_checkpoint(tmp_path / "dense", tied=True))
    assert report.gates is None
    assert report.parameters["gates"] == 0


def test_command(tiny_bundle: Path, tiny_gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    for part in ("bundle, llama", "vector on attn and mlp", "budget 0.7", "weights.bin", "not verified yet"):
        assert part in out
    assert run(["inspect", str(tiny_gated), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"
    assert run(["inspect", str(tiny_gated / "nothing")]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_api_is_lazy_and_its_functions_stay_functions() -> None:
    code = (
        "import sys, gsx; gsx.GsxError; gsx.open_bundle; gsx.__version__;"
        "assert not {'torch', 'transformers'} & set(sys.modules);"
        "import gsx.workflows.inspect; from gsx_plugins.progress import Progress;"
        "assert callable(gsx.inspect) and callable(gsx.export) and callable(gsx.verify);"
        "assert set(gsx.__all__) <= set(dir(gsx));"
        "[getattr(gsx, name) for name in gsx.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gsx.nothing  # type: ignore[attr-defined]  # noqa: B018
