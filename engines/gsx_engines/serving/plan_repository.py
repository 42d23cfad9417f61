"""Engines as models of Triton's own `tensorrt` backend, for people who have their own orchestrator.

    REPO/NAME/              for `model`; NAME_draft and NAME_verify if the bundle is split at an exit
      config.pbtxt
      1/model.plan          the engine

This backend allocates outputs separately from inputs, so K and V must grow (`gsx build --kv-layout growing`). It uses
TensorRT, so it cannot run engines of TensorRT-RTX. The batch is an axis of the shapes, as in the graph: the server does
no batching.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from gsx_engines.bundle.bundle import Bundle, writing
from gsx_engines.bundle.engine_entry import EngineEntry, EngineGraph
from gsx_engines.bundle.fields import TensorInfo
from gsx_engines.errors import EngineError
from gsx_engines.lowering.for_tensorrt.task import K
from gsx_engines.serving.model_config import DataType, Tensor, TritonConfig
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.loading import ENGINES, EngineSet, read_engine
from gsx_plugins.errors import UsageError

_TYPES = {"float": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "int64": "TYPE_INT64"}


def write_plan_repository(bundle: Bundle, target: Path, *, name: str) -> list[Path]:
    """Write a repository with a model for each of a bundle's engines.

    Args:
        bundle: its TensorRT engines with growing K and V are used; of several sets, the one for this machine's GPU.
        target: the repository; it must not exist yet, or be an empty directory.
        name: of the model `model`; the names of the others begin with it.
    Returns: the directories of the models.
    Raises:
        UsageError: the target is occupied, or the name cannot be used.
        EngineError: the bundle has no such engines, or their files were changed.
    """
    build = f"gsx build {bundle.directory} --backend tensorrt --kv-layout growing"
    engines = _engines(bundle, build)
    entry = engines.entry
    names = {graph: name if graph == "model" else f"{name}_{graph}" for graph in entry.graphs}
    configs = {graph: _config(bundle, entry, made, names[graph]).text() for graph, made in entry.graphs.items()}
    with writing(target, overwrite=False, needed_bytes=sum(made.size_bytes for made in entry.graphs.values())) as work:
        for graph, config in configs.items():
            version = work / names[graph] / "1"
            version.mkdir(parents=True)
            (version / "model.plan").write_bytes(read_engine(engines, graph, build))
            (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    return [target / one for one in names.values()]


def _engines(bundle: Bundle, build: str) -> EngineSet:
    there = bundle.manifest.engines
    reasons = {name: _unfit(entry) for name, entry in there.items()}
    fitting = {name: entry for name, entry in there.items() if reasons[name] is None}
    if not fitting:
        raise EngineError(
            f"bundle {bundle.directory}: has no engines that Triton's tensorrt backend can run",
            expected="TensorRT engines with growing K and V",
            found="; ".join(f"{name}, {reason}" for name, reason in reasons.items()) or "none",
            todo=f"{build}, on the server's GPU; gsx triton with another --backend serves the rest",
        )
    device = cuda.device()
    here = [name for name, entry in fitting.items() if device is not None and device.capability in entry.targets]
    (name, *more) = here or fitting
    if more:
        raise UsageError(
            f"bundle {bundle.directory}: has engines for several GPUs",
            expected="engines for one GPU, or running this command on the server's GPU",
            found=", ".join(fitting),
        )
    return EngineSet(bundle.directory / ENGINES / name, fitting[name], None)


def _unfit(entry: EngineEntry) -> str | None:
    """Why Triton's backend cannot run an engine; None if it can."""
    if entry.backend != "tensorrt":
        return "which TensorRT cannot load"
    return "which updates K/V in place" if entry.kv_layout != "growing" else None


def _config(bundle: Bundle, entry: EngineEntry, made: EngineGraph, name: str) -> TritonConfig:
    selection = bundle.manifest.selection
    parameters = {"most_tokens": str(entry.capacity)}
    if selection is not None and any(value.name == "thresholds" for value in made.inputs):
        # For clients: the value of the input of this name that corresponds to the exported budget.
        table = selection.thresholds_for(selection.budget).tolist()
        parameters["thresholds"] = json.dumps([table] if bundle.manifest.by_sequence("thresholds") else table)
    try:
        return TritonConfig(
            name=name,
            backend="tensorrt",
            inputs=tuple(map(_tensor, made.inputs)),
            outputs=tuple(map(_tensor, made.outputs)),
            kind="KIND_GPU",
            decoupled=False,
            parameters=parameters,
            profiles=tuple(range(len(entry.profiles))),
        )
    except ValidationError as error:  # only the name comes from the user
        raise UsageError(
            "the model's name is not valid",
            expected="letters, digits, '_', '-' and '.', beginning with none of the last two",
            found=repr(name),
        ) from error


def _tensor(value: TensorInfo) -> Tensor:
    dims = tuple(-1 if isinstance(axis, str) else axis for axis in value.shape)
    kind = cast(DataType, _TYPES[value.type])
    return Tensor(name=value.name, data_type=kind, dims=dims, shape_tensor=value.name == K)
