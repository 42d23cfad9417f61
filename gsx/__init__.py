"""gsx: token-gated and early-exit language models as ONNX graphs that really skip the work.

The public API. Everything is imported on first use, so that `import gsx` costs nothing and running a bundle
never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsx.workflows.doctor import doctor as doctor
    from gsx.workflows.export import export as export
    from gsx.workflows.generate import generate as generate
    from gsx.workflows.inspect import inspect as inspect
    from gsx.workflows.triton import triton as triton
    from gsx.workflows.verify import verify as verify
    from gsx_engines.building.build import build as build
    from gsx_engines.bundle.bundle import Bundle as Bundle
    from gsx_engines.bundle.bundle import open_bundle as open_bundle
    from gsx_exporter.convert import convert as convert
    from gsx_plugins.errors import GsxError as GsxError

    __version__: str

# Public name -> module that has it.
_HOMES = {
    "Bundle": "gsx_engines.bundle.bundle",
    "GsxError": "gsx_plugins.errors",
    "build": "gsx_engines.building.build",
    "convert": "gsx_exporter.convert",
    "doctor": "gsx.workflows.doctor",
    "export": "gsx.workflows.export",
    "generate": "gsx.workflows.generate",
    "inspect": "gsx.workflows.inspect",
    "open_bundle": "gsx_engines.bundle.bundle",
    "triton": "gsx.workflows.triton",
    "verify": "gsx.workflows.verify",
}

__all__ = [
    "Bundle",
    "GsxError",
    "__version__",
    "build",
    "convert",
    "doctor",
    "export",
    "generate",
    "inspect",
    "open_bundle",
    "triton",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gsx")
    if name not in _HOMES:
        raise AttributeError(f"module 'gsx' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
