"""Errors about checkpoints and texts. Their base class, and errors that all packages share: `gsx_plugins.errors`."""

from __future__ import annotations

from gsx_plugins.errors import GsxError


class CheckpointError(GsxError):
    """A model directory that is missing, damaged, or of a kind that gsx does not support."""


class TextError(GsxError):
    """A calibration or evaluation text that cannot be used."""
