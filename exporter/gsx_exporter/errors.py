"""The errors of checkpoints and texts; their base and the kinds of every floor are in `gsx_plugins.errors`."""

from __future__ import annotations

from gsx_plugins.errors import GsxError


class CheckpointError(GsxError):
    """A model directory that is missing, damaged, or of a kind that gsx does not support."""


class TextError(GsxError):
    """A calibration or evaluation text that cannot be used."""
