"""gsx: token-gated and early-exit language models as ONNX graphs that really skip the work.

The public API: one function per command, with the same name, and the types that they take. Everything is imported
on first use, so that `import gsx` costs nothing and running a bundle never imports torch. The reference is docs/api.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsx import plugins as plugins
    from gsx.parity.quality import QualityLimits as QualityLimits
    from gsx.workflows.bench import bench as bench
    from gsx.workflows.compare import compare as compare
    from gsx.workflows.doctor import doctor as doctor
    from gsx.workflows.export import export as export
    from gsx.workflows.generate import generate as generate
    from gsx.workflows.hub import push as push
    from gsx.workflows.inspect import inspect as inspect
    from gsx.workflows.quantize import Quantize as Quantize
    from gsx.workflows.serve import serve as serve
    from gsx.workflows.study import study as study
    from gsx.workflows.train import train as train
    from gsx.workflows.triton import check_server as check_server
    from gsx.workflows.triton import triton as triton
    from gsx.workflows.triton import triton_plans as triton_plans
    from gsx.workflows.tune import tune as tune
    from gsx.workflows.verify import verify as verify
    from gsx_engines.building.build import build as build
    from gsx_engines.bundle.bundle import Bundle as Bundle
    from gsx_engines.bundle.bundle import open_bundle as open_bundle
    from gsx_exporter.convert import convert as convert
    from gsx_exporter.training.exit_classifiers import train_exit_classifiers as train_exit_classifiers
    from gsx_exporter.training.exit_gate import train_exit_gate as train_exit_gate
    from gsx_exporter.training.linear_scores import train_linear_scores as train_linear_scores
    from gsx_exporter.training.settings import TrainSettings as TrainSettings
    from gsx_plugins.errors import GsxError as GsxError
    from gsx_plugins.progress import Progress as Progress

    __version__: str

# Public name -> module that defines it.
_HOMES = {
    "Bundle": "gsx_engines.bundle.bundle",
    "GsxError": "gsx_plugins.errors",
    "Progress": "gsx_plugins.progress",
    "QualityLimits": "gsx.parity.quality",
    "Quantize": "gsx.workflows.quantize",
    "TrainSettings": "gsx_exporter.training.settings",
    "bench": "gsx.workflows.bench",
    "build": "gsx_engines.building.build",
    "check_server": "gsx.workflows.triton",
    "compare": "gsx.workflows.compare",
    "convert": "gsx_exporter.convert",
    "doctor": "gsx.workflows.doctor",
    "export": "gsx.workflows.export",
    "generate": "gsx.workflows.generate",
    "inspect": "gsx.workflows.inspect",
    "open_bundle": "gsx_engines.bundle.bundle",
    "push": "gsx.workflows.hub",
    "serve": "gsx.workflows.serve",
    "study": "gsx.workflows.study",
    "train": "gsx.workflows.train",
    "train_exit_classifiers": "gsx_exporter.training.exit_classifiers",
    "train_exit_gate": "gsx_exporter.training.exit_gate",
    "train_linear_scores": "gsx_exporter.training.linear_scores",
    "triton": "gsx.workflows.triton",
    "triton_plans": "gsx.workflows.triton",
    "tune": "gsx.workflows.tune",
    "verify": "gsx.workflows.verify",
}

__all__ = [
    "Bundle",
    "GsxError",
    "Progress",
    "QualityLimits",
    "Quantize",
    "TrainSettings",
    "__version__",
    "bench",
    "build",
    "check_server",
    "compare",
    "convert",
    "doctor",
    "export",
    "generate",
    "inspect",
    "open_bundle",
    "plugins",
    "push",
    "serve",
    "study",
    "train",
    "train_exit_classifiers",
    "train_exit_gate",
    "train_linear_scores",
    "triton",
    "triton_plans",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gsx")
    if name == "plugins":
        return import_module("gsx.plugins")
    if name not in _HOMES:
        raise AttributeError(f"module 'gsx' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
