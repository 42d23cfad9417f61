"""The errors of bundles and engines; their base and the kinds of every floor are in `gsx_plugins.errors`."""

from __future__ import annotations

from gsx_plugins.errors import GsxError


class BundleError(GsxError):
    """A bundle that is missing, damaged, changed after export, or written by another version."""


class EngineError(GsxError):
    """An engine that cannot be built, loaded or run here: its runtime, its GPU, its profiles or its plugins."""


class LostGpuError(EngineError):
    """A GPU that this process can no longer use: its memory and its engines are gone, and only a new process gets
    others. A server ends; everybody else starts again."""
