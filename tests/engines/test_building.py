"""Engines are really built, by TensorRT-RTX and without a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gsx.cli import run
from gsx.workflows.quantize import Quantize
from gsx_engines.building.build import build
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.cuda import Device
from gsx_engines.tensorrt.loading import ENGINES
from tests.engines.built import BRANCHES, LAYERS, RTX, Plugins, build_small, check, needs_plugins

INT8 = Quantize("int8", ("none",))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("plugins", ["none", "auto"])
def test_threshold_selection_with_and_without_plugins(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, precision: str, plugins: Plugins
) -> None:
    if plugins == "auto":
        needs_plugins()
    options = {} if precision == "fp32" else {"precision": precision}
    directory = Path(shutil.copytree(make_tiny_bundle(**options), tmp_path / "bundle"))
    phases: list[str] = []
    name, entry = build_small(directory, plugins=plugins, on_progress=lambda p: phases.append(p.note))
    assert name == f"{RTX}-sm89"
    check(directory, name, entry)
    graph = entry.graphs["model"]
    assert graph.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert graph.layers["ATTENTION_INPUT"] == LAYERS
    if plugins == "none":
        assert graph.forms == {"ThresholdGather": "mask", "GatheredAttention": "all", "GatedScatterAdd": "mask"}
        assert not any(layer.startswith("PLUGIN") for layer in graph.layers)
        assert entry.plugins is None
    else:
        assert graph.forms == {"ThresholdGather": "plugin", "GatheredAttention": "all", "GatedScatterAdd": "plugin"}
        assert graph.layers["PLUGIN_V3"] == 2 * BRANCHES  # a choice and an addition each
        assert entry.plugins is not None
    assert {value.type for value in graph.inputs if value.name.startswith("past")} == {
        {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}[precision]
    }
    assert next(value for value in graph.outputs if value.name == "logits").type == "float"
    assert graph.peak_bytes > graph.size_bytes
    assert any("Building" in phase for phase in phases)


@pytest.mark.parametrize("plugins", ["none", "auto"])
def test_rank_selection_saves_without_plugins_too(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, plugins: Plugins
) -> None:
    """TopKGather's body is imported, with k as an input on the host; with plugins the budget is the input."""
    if plugins == "auto":
        needs_plugins()
    directory = Path(shutil.copytree(make_tiny_bundle(select="rank", calibration=None), tmp_path / "bundle"))
    name, entry = build_small(directory, plugins=plugins, profiles=["prefill:2-16-48", "chunk:2-4-8", "decode:1"])
    check(directory, name, entry)
    graph = entry.graphs["model"]
    inputs = {value.name for value in graph.inputs}
    if plugins == "none":
        assert graph.forms["TopKGather"] == "body"
        assert graph.layers["TOPK"] == 2 * BRANCHES
        assert "k" in inputs
        assert "budget" not in inputs
    else:
        assert graph.forms["TopKGather"] == "plugin"
        assert "budget" in inputs
    assert [profile.name for profile in entry.profiles] == ["prefill", "chunk", "decode"]


def test_a_batch_and_targets_side_by_side(bundle: Path) -> None:
    """Engines for other targets stay; the same ones are replaced."""
    first, _ = build_small(bundle, plugins="none", batch=2)
    second, entry = build(bundle, plugins="none", context=64, targets=["sm80", "12.0"])
    assert (first, second) == (f"{RTX}-sm89", f"{RTX}-sm80-120")
    assert entry.targets == ("80", "120")
    before = open_bundle(bundle).manifest.engines
    assert set(before) == {first, second}
    assert before[first].profiles[0].batch.most == 2
    build_small(bundle, plugins="none")
    after = open_bundle(bundle).manifest.engines
    assert after[first].profiles[0].batch.most == 1
    assert after[second] == before[second]
    assert sorted(path.name for path in (bundle / ENGINES).iterdir()) == sorted([first, second])


@pytest.mark.parametrize(
    ("plugins", "options"),
    [
        ("none", {}),
        ("auto", {}),
        ("none", {"precision": "fp16", "quantize": INT8}),
        ("auto", {"precision": "fp16"}),
    ],
    ids=["fp32, masks", "fp32, plugins", "int8, masks", "fp16, plugins"],
)
def test_k_and_v_that_grow(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, plugins: Plugins, options: dict[str, Any]
) -> None:
    """The engine has the graph's own inputs and outputs, and is stored beside the one that gsx runs."""
    if plugins == "auto":
        needs_plugins()
    directory = Path(shutil.copytree(make_tiny_bundle(**options), tmp_path / "bundle"))
    profiles = ["prompt:2-8-32", "step:1:1-1-4"]
    name, entry = build_small(directory, plugins=plugins, kv_layout="growing", profiles=profiles)
    check(directory, name, entry)
    assert (name, entry.kv_layout) == (f"{RTX}-sm89-growing", "growing")
    graph, portable = entry.graphs["model"], open_bundle(directory).manifest.graphs["model"]
    assert (set(graph.inputs), set(graph.outputs)) == (set(portable.inputs), set(portable.outputs))
    assert "KV_CACHE_UPDATE" not in graph.layers
    assert graph.layers["ATTENTION_INPUT"] == LAYERS
    assert graph.forms["ThresholdGather"] == {"none": "mask", "auto": "plugin"}[plugins]
    assert graph.products.get("int8", 0) == (7 * LAYERS if "quantize" in options else 0)
    second, _ = build_small(directory, plugins="none")
    assert set(open_bundle(directory).manifest.engines) == {name, second}


def test_a_gpu_that_tensorrt_rtx_does_not_know(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines for other GPUs are built anyway; a message says that they do not run here, and what does."""
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.setattr(cuda, "device", lambda: Device("NVIDIA H200", "90", 141 << 30))
    command = ["build", str(directory), "--context", "64"]
    assert run(command) == 0
    found = capsys.readouterr()
    assert "NOT FOR THE GPU OF THIS MACHINE (NVIDIA H200, 9.0)" in found.err
    assert "8.9" in found.out
    assert run([*command, "--target", "8.9"]) == 0
    assert "NOT FOR THE GPU" not in capsys.readouterr().err


def test_profiles_without_single_tokens(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(bundle), "--context", "64", "--plugins", "none", "--profile"]
    assert run([*command, "prefill:2-32"]) == 0
    assert "NO PROFILE TAKES CALLS OF ONE TOKEN" in capsys.readouterr().err
    assert run([*command, "prefill:2-32", "--profile", "decode:1"]) == 0
    assert "ONE TOKEN" not in capsys.readouterr().err
