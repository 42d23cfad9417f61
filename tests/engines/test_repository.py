"""What `gsx triton` writes and refuses; tests/serving runs the result in a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gsx.cli import run
from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.errors import EngineError
from gsx_engines.serving.device import show_own_device
from gsx_engines.serving.fields import INPUTS, OUTPUTS
from gsx_engines.serving.model_config import Tensor, TritonConfig
from gsx_engines.serving.repository import write_repository
from gsx_plugins.errors import UsageError
from gsx_plugins.library import source_hash
from tests.engines.cpu_engine import cpu_engines


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def test_a_repository_is_whole(bundle: Bundle, tmp_path: Path) -> None:
    model = write_repository(bundle, tmp_path / "models", name="tiny", slots=3, threads=1)
    assert sorted(path.name for path in model.iterdir()) == ["1", "config.pbtxt", "requirements.txt"]
    config = (model / "config.pbtxt").read_text()
    for field in (*INPUTS, *OUTPUTS):
        assert f'name: "{field.name}"\n  data_type: {field.data_type}\n  dims: [{-1 if field.many else 1}]' in config
    assert "kind: KIND_CPU" in config
    assert "decoupled: true" in config
    assert 'key: "slots"\n  value { string_value: "3" }' in config
    assert open_bundle(model / "1" / "bundle", check_weights=True).manifest == bundle.manifest
    assert "numpy>=1.26,<2" in (model / "requirements.txt").read_text().splitlines()
    assert (model / "1" / "gsx_engines" / "serving" / "triton_model.py").is_file()
    assert not list(model.rglob("__pycache__"))
    code = "from gsx_plugins.library import source_hash; print(source_hash())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=model / "1",
        env={**os.environ, "PYTHONPATH": str(model / "1")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == source_hash(), "it finds the plugin library of these sources"


@pytest.mark.parametrize(
    ("kind", "number", "visible", "shown"),
    [
        ("GPU", "2", None, "2"),
        ("GPU", "1", "GPU-a, GPU-b", "GPU-b"),
        ("GPU", "0", "5", "5"),
        ("CPU", "0", "5,6", "5,6"),
        ("CPU", "0", None, None),
    ],
)
def test_an_instance_sees_its_own_gpu(kind: str, number: str, visible: str | None, shown: str | None) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    show_own_device({"model_instance_kind": kind, "model_instance_device_id": number}, environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == shown


def test_the_context_is_what_the_engines_hold(tiny_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(tiny_bundle)
    entry, _ = cpu_engines(opened, default_profiles(64, 3), capacity=64)
    bundle = Bundle(opened.directory, opened.manifest.model_copy(update={"engines": {"cpu": entry}}))
    model = write_repository(bundle, tmp_path / "a", name="tiny", backend="tensorrt-rtx", slots=3, gpus=[0, 2])
    assert "kind: KIND_GPU\n  gpus: [0, 2]\n}" in (model / "config.pbtxt").read_text()
    assert 'key: "context"\n  value { string_value: "64" }' in (model / "config.pbtxt").read_text()
    with pytest.raises(EngineError, match=r"context of at most 64, found 100\n.*--context 100"):
        write_repository(bundle, tmp_path / "b", name="tiny", backend="tensorrt-rtx", slots=3, context=100)


def test_the_docs_name_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "triton.md").read_text(encoding="utf-8")
    for field in (*INPUTS, *OUTPUTS):
        assert f"`{field.name}`" in page, field.name


def test_a_request_has_every_keep_setting() -> None:
    assert {field.name for field in fields(KeepSettings)} <= {field.name for field in INPUTS}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "a/b"}, UsageError, "model's name"),
        ({"name": ".."}, UsageError, "model's name"),
        ({"slots": 0}, UsageError, "slots"),
        ({"queue": -1}, UsageError, "queue"),
        ({"threads": 0}, UsageError, "threads"),
        ({"context": 1}, UsageError, "context"),
        ({"context": 10**6}, UsageError, "context"),
        ({"gpus": [0]}, UsageError, "runs on the CPU"),
        ({"gpus": [1, 1], "backend": "tensorrt"}, UsageError, "GPUs are not valid"),
        ({"gpus": [-1], "backend": "tensorrt"}, UsageError, "GPUs are not valid"),
        ({"backend": "tensorrt"}, EngineError, "has no engines for tensorrt"),
    ],
)
def test_what_cannot_be_written_is_refused(
    bundle: Bundle, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_repository(bundle, tmp_path / "models", **{"name": "tiny", **options})
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_repository(bundle, tmp_path / "models", name="tiny")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]


@pytest.mark.parametrize("change", [{"name": "a b"}, {"kind": "KIND_TPU"}, {"inputs": ()}, {"more": 1}])
def test_a_configuration_is_checked_before_it_is_written(change: dict[str, object]) -> None:
    tensor = Tensor(name="x", data_type="TYPE_INT64", dims=(-1,))
    good = {
        "name": "m",
        "backend": "python",
        "inputs": (tensor,),
        "outputs": (tensor,),
        "kind": "KIND_CPU",
        "decoupled": True,
        "parameters": {"note": 'a "quoted"\nline'},
    }
    assert r'string_value: "a \"quoted\"\nline"' in TritonConfig.model_validate(good).text()
    with pytest.raises(ValidationError):
        TritonConfig.model_validate({**good, **change})


def test_the_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["triton", str(tiny_bundle), "-o", str(tmp_path / "models"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "models" / "gsx")
    assert run(["triton", str(tiny_bundle), "-o", str(tmp_path / "models")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert run(["triton", str(tiny_bundle)]) == 2
    assert "-o REPOSITORY or --check URL" in capsys.readouterr().err
    assert run(["triton", str(tiny_bundle), "--check", "localhost:8000"]) == 2
    assert run(["triton", str(tiny_bundle), "-o", str(tmp_path / "other"), "--backend", "tensorrt-rtx"]) == 1
    assert "gsx build" in capsys.readouterr().err
