"""gsx: token-gated and early-exit language models as ONNX graphs that really skip the work.

The public API. Everything is imported on first use, so that `import gsx` costs nothing and running a bundle
never imports torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.building.build import build as build
    from engines.bundle.bundle import Bundle as Bundle
    from engines.bundle.bundle import open_bundle as open_bundle
    from engines.errors import GsxError as GsxError
    from exporter.convert import convert as convert
    from gsx.doctor import doctor as doctor
    from gsx.export import export as export
    from gsx.generate import generate as generate
    from gsx.inspect import inspect as inspect
    from gsx.triton import triton as triton
    from gsx.verify import verify as verify

    __version__: str

# Public name -> module that has it.
_HOMES = {
    "Bundle": "engines.bundle.bundle",
    "GsxError": "engines.errors",
    "build": "engines.building.build",
    "convert": "exporter.convert",
    "doctor": "gsx.doctor",
    "export": "gsx.export",
    "generate": "gsx.generate",
    "inspect": "gsx.inspect",
    "open_bundle": "engines.bundle.bundle",
    "triton": "gsx.triton",
    "verify": "gsx.verify",
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


class _Face(ModuleType):
    """Keeps `gsx.export` the function: importing the module of that name would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
