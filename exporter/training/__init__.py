"""Training gated checkpoints: GateSkip's and LayerSkip's recipes together, as a library (`gsx train` is its face)."""

from exporter.training.config import ModelShape, TrainConfig
from exporter.training.loop import StepReport, TrainResult, export_snapshot, train

__all__ = ["ModelShape", "StepReport", "TrainConfig", "TrainResult", "export_snapshot", "train"]
