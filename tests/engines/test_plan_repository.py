"""Engines as models of Triton's own TensorRT backend: the files match Triton's schema and the engine.

TensorRT itself is not available to build with, so the engines are TensorRT-RTX's, with shapes that TensorRT-RTX
accepts, and their record names TensorRT.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gsx.cli import run
from gsx_engines.building.build import build
from gsx_engines.bundle.bundle import Bundle, open_bundle, write_manifest
from gsx_engines.errors import EngineError
from gsx_engines.serving.plan_repository import write_plan_repository
from gsx_engines.tensorrt.loading import ENGINES
from gsx_plugins.errors import UsageError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
pytest.importorskip("polygraphy", reason='polygraphy is not installed: pip install "gsx[tensorrt]"')

# Triton's own Python packages, with its protobuf schema.
PYTHON = Path(__file__).parents[2] / ".venv-triton" / "bin" / "python"
READ = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
print(json_format.MessageToJson(text_format.Parse(sys.stdin.read(), ModelConfig()), preserving_proto_field_name=True))
"""
TYPES = {"int64": "TYPE_INT64", "float": "TYPE_FP32", "float16": "TYPE_FP16"}


def read_config(path: Path) -> dict[str, Any]:
    """A configuration, as Triton's schema reads it."""
    if not PYTHON.exists():
        pytest.skip("no .venv-triton: make triton")
    done = subprocess.run([PYTHON, "-c", READ], input=path.read_text(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def rtx(make_tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that is split at an exit, with engines of TensorRT-RTX whose K and V grow."""
    directory = tmp_path_factory.mktemp("plans") / "bundle"
    shutil.copytree(make_tiny_bundle(kv_policy="copy", budget=0.5, draft="exit:1"), directory)
    profiles = ["prompt:2-8-32", "step:1"]
    build(directory, kv_layout="growing", context=64, targets=["8.9"], profiles=profiles, plugins="none")
    return open_bundle(directory)


@pytest.fixture(scope="module")
def bundle(rtx: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, with its engines recorded as TensorRT's."""
    directory = tmp_path_factory.mktemp("plans") / "bundle"
    shutil.copytree(rtx.directory, directory)
    ((name, entry),) = rtx.manifest.engines.items()
    renamed = {"tensorrt-sm89-growing": entry.model_copy(update={"backend": "tensorrt", "gpu": "GeForce"})}
    (directory / ENGINES / name).rename(directory / ENGINES / "tensorrt-sm89-growing")
    write_manifest(directory, rtx.manifest.model_copy(update={"engines": renamed}))
    return open_bundle(directory)


def test_models_are_the_engines(bundle: Bundle, tmp_path: Path) -> None:
    models = write_plan_repository(bundle, tmp_path / "models", name="tiny")
    assert [model.name for model in models] == ["tiny", "tiny_draft", "tiny_verify"]
    (entry,) = bundle.manifest.engines.values()
    for model, made in zip(models, entry.graphs.values(), strict=True):
        plan = (model / "1" / "model.plan").read_bytes()
        assert plan == (bundle.directory / ENGINES / "tensorrt-sm89-growing" / made.file).read_bytes()
        config = read_config(model / "config.pbtxt")
        assert (config["name"], config["platform"], config["backend"]) == (model.name, "tensorrt_plan", "tensorrt")
        assert config.get("max_batch_size", 0) == 0
        assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "profile": ["0", "1"]}]
        for field, tensors in (("input", made.inputs), ("output", made.outputs)):
            assert [
                (tensor["name"], tensor["data_type"], [int(axis) for axis in tensor["dims"]])
                for tensor in config[field]
            ] == [
                (value.name, TYPES[value.type], [-1 if isinstance(axis, str) else axis for axis in value.shape])
                for value in tensors
            ]
        selection = bundle.manifest.selection
        assert selection is not None
        given = json.loads(config["parameters"]["thresholds"]["string_value"])
        assert given == [selection.thresholds_for(0.5).tolist()]
    names = {value.name for value in entry.graphs["model"].inputs}
    assert {"input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "thresholds"} <= names


def test_scalars_and_values_on_the_host(bundle: Bundle, tmp_path: Path) -> None:
    """With rank selection: a budget is a scalar, for which Triton has no shape; k is read before the engine runs."""
    (name, entry), *_ = bundle.manifest.engines.items()
    graph = entry.graphs["model"]
    more = [
        graph.inputs[0].model_copy(update={"name": "budget", "type": "float", "shape": ()}),
        graph.inputs[0].model_copy(update={"name": "k", "shape": (1,)}),
    ]
    changed = entry.model_copy(
        update={"graphs": {"model": graph.model_copy(update={"inputs": (*graph.inputs, *more)})}}
    )
    manifest = bundle.manifest.model_copy(update={"engines": {name: changed}})
    (model,) = write_plan_repository(Bundle(bundle.directory, manifest), tmp_path / "models", name="tiny")
    *_, budget, k = read_config(model / "config.pbtxt")["input"]
    assert (budget["dims"], budget["reshape"]) == (["1"], {})
    assert (k["dims"], k["is_shape_tensor"]) == (["1"], True)


def test_what_triton_could_not_load_is_refused(
    rtx: Bundle, bundle: Bundle, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models"
    (entry,) = bundle.manifest.engines.values()
    in_place = entry.model_copy(update={"kv_layout": "in-place"})
    bundles = {
        r"found none\n.*gsx build .* --backend tensorrt --kv-layout growing": open_bundle(tiny_bundle),
        r"found tensorrt-rtx-.*-sm89-growing, which TensorRT cannot load\n": rtx,
        r"found plain, which updates K/V in place\n": Bundle(
            bundle.directory, bundle.manifest.model_copy(update={"engines": {"plain": in_place}})
        ),
    }
    for message, refused in bundles.items():
        with pytest.raises(EngineError, match=message):
            write_plan_repository(refused, target, name="tiny")
    with pytest.raises(UsageError, match="model's name"):
        write_plan_repository(bundle, target, name="a/b")
    several = bundle.manifest.model_copy(update={"engines": {"one": entry, "two": entry}})
    with pytest.raises(UsageError, match=r"several GPUs\n.*found one, two"):
        write_plan_repository(Bundle(bundle.directory, several), target, name="tiny")
    command = ["triton", str(rtx.directory), "-o", str(target), "--backend"]
    assert run([*command, "tensorrt-plan"]) == 1
    assert "which TensorRT cannot load" in capsys.readouterr().err
    assert run([*command, "tensorrt-plan", "--slots", "2"]) == 2
    assert run([*command, "tensorrt-rtx"]) == 1
    assert "has no engines for tensorrt-rtx that update K/V in place" in capsys.readouterr().err
    assert not target.exists()


def test_the_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "models"
    assert run(["triton", str(bundle.directory), "-o", str(target), "--backend", "tensorrt-plan"]) == 0
    said = capsys.readouterr().out
    assert f"tritonserver --model-repository={target} --backend-config=tensorrt,plugins=/" in said
    assert sorted(path.name for path in target.iterdir()) == ["gsx", "gsx_draft", "gsx_verify"]


def test_a_plan_that_changed_is_not_copied(bundle: Bundle, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(bundle.directory, tmp_path / "bundle"))
    (directory / ENGINES / "tensorrt-sm89-growing" / "model.engine").write_bytes(b"other")
    with pytest.raises(EngineError, match="is incomplete"):
        write_plan_repository(open_bundle(directory), tmp_path / "models", name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
