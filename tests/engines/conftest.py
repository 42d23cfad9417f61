"""A copy of an export, to damage or to build engines in; and stages on a stand-in for the GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.tensorrt import cuda, execution
from gsx_engines.tensorrt.backend import Backend
from gsx_engines.tensorrt.execution import CudaEngine
from tests.engines.cpu_engine import cpu_stages
from tests.engines.standin_gpu import CAPACITY, StandInCuda, StandInTensorRT


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A copy of the tiny bundle."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@dataclass(frozen=True)
class Made:
    """A stage whose engine is a `CudaEngine`, and the stand-in GPU that it runs on."""

    stage: TensorRTStage
    trt: StandInTensorRT
    gpu: StandInCuda

    @property
    def strategy(self) -> str:
        return str(self.trt.config.cuda_graph_strategy)


Make = Callable[..., dict[str, Made]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Stages of a bundle by graph, on one stand-in GPU, each beside the first."""
    gpu = StandInCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)

    def made(
        bundle: Bundle, backend: Backend, *, plugins: Collection[str] = (), batch: int = 1, graphs: bool = True
    ) -> dict[str, Made]:
        profiles = default_profiles(CAPACITY, batch)
        stages: dict[str, Made] = {}
        first: CudaEngine | None = None
        for name, (stage, engine) in cpu_stages(bundle, profiles, capacity=CAPACITY, plugins=plugins).items():
            trt = StandInTensorRT(gpu, engine)
            monkeypatch.setattr(execution, "load_module", lambda _, trt=trt: trt)
            on_gpu = CudaEngine(backend, bytes(100), library=None, cuda_graphs=graphs, kernels=None, beside=first)
            first = first or on_gpu
            stages[name] = Made(TensorRTStage(bundle.manifest, stage._entry, name, on_gpu), trt, gpu)
        return stages

    return made
