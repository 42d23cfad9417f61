"""Training gated checkpoints: the recipes of GateSkip and LayerSkip combined, as a library."""

from gsx_exporter.training.config import ModelShape, TrainConfig
from gsx_exporter.training.loop import StepReport, TrainResult, export_snapshot, train

__all__ = ["ModelShape", "StepReport", "TrainConfig", "TrainResult", "export_snapshot", "train"]
