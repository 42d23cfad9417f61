"""Builds engines of the tiny model with TensorRT-RTX, which needs no GPU. Without it, importing modules are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import onnx
import pytest

from gsx_engines.building.build import build
from gsx_engines.bundle.bundle import MANIFEST, open_bundle, sha256_of
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES
from gsx_engines.tensorrt.preload import preload_tensorrt_rtx
from gsx_plugins.library import find_library

preload_tensorrt_rtx()  # in the way that plugins work with, whichever test imports it first
rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
pytest.importorskip("polygraphy", reason='polygraphy is not installed: pip install "gsx[tensorrt]"')

LAYERS = 3  # of the tiny model
BRANCHES = 2 * LAYERS
RTX = f"tensorrt-rtx-{rtx.__version__}"
Plugins = Literal["none", "auto"]


def build_small(bundle: Path, **options: Any) -> tuple[str, EngineEntry]:
    """`build` for one target and 64 columns of K and V."""
    return build(bundle, context=64, targets=["8.9"], **options)


def needs_plugins() -> None:
    """Skip if there is no plugin library."""
    if find_library() is None:
        pytest.skip("no plugin library was built: gsx plugins build")


def state(directory: Path) -> dict[str, str]:
    """Every file of a directory and its hash."""
    return {str(path.relative_to(directory)): sha256_of(path) for path in directory.rglob("*") if path.is_file()}


def check(directory: Path, name: str, entry: EngineEntry) -> None:
    """Check what every build must write: the files, and two equal records of them."""
    manifest = open_bundle(directory).manifest
    assert manifest.engines[name] == entry
    folder = directory / ENGINES / name
    assert EngineEntry.model_validate(json.loads((folder / ENGINE_FILE).read_text())) == entry
    files = (f"{graph}.{kind}" for graph in manifest.graphs for kind in ("engine", "plan.json"))
    assert {path.name for path in folder.iterdir()} == {ENGINE_FILE, *files}
    for key, graph in entry.graphs.items():
        assert sha256_of(folder / graph.file) == graph.sha256
        assert graph.graph_sha256 == manifest.graphs[key].sha256
    assert [path.name for path in (directory / ENGINES).iterdir()] == [name]


def edit_graph(directory: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Change a bundle's graph, and its hash in the manifest."""
    path = directory / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["graphs"]["model"]["sha256"] = sha256_of(path)
    (directory / MANIFEST).write_text(json.dumps(manifest))
