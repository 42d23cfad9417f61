"""A checkpoint whose vector gates are rounded to the graph's 16-bit type, before anything is calibrated on them.

A vector gate's weight is as large as one of attention's, and every decode step reads it, so it has 16 bits in a graph
of 16 bits. Products and sums stay in float32: scores are those of the rounded weights. Thresholds must come from the
same scores, so rounding comes first. A scalar gate's weight is a vector, and stays in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import is_gate


@dataclass
class RoundedGates(Checkpoint):
    """A checkpoint whose vector gates are rounded when they are read.

    Args: gate_type: what their weights are rounded to; they keep the type in which they are stored.
    """

    gate_type: torch.dtype = torch.float32

    def parameter(self, name: str) -> torch.Tensor:
        """See `Checkpoint.parameter`."""
        found = super().parameter(name)
        if is_gate(name) and found.ndim == 2 and found.shape[0] > 1:
            return found.to(self.gate_type).to(found.dtype)
        return found


def with_rounded_gates(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The model as a graph of this type has it; itself if it has no vector gates, or if the type is float32."""
    gate = checkpoint.config.gate
    if gate is None or gate.kind != "vector" or dtype == torch.float32:
        return checkpoint
    return RoundedGates(**{one.name: getattr(checkpoint, one.name) for one in fields(Checkpoint)}, gate_type=dtype)
