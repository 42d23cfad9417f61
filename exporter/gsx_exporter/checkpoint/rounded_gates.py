"""A checkpoint whose vector gates are rounded to the graph's 16-bit type, before anything is calibrated on them.

The product of a vector gate is as large as one of attention's, and a decode step reads its weights for every token. In
a graph of 16 bits they have 16 bits too; products and sums stay in float32, so the score is that of the rounded
weights. Rounding them first gives thresholds of the same arithmetic. A scalar gate's weight is a vector, and stays in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import is_gate


@dataclass
class RoundedGates(Checkpoint):
    """A checkpoint whose tensors are rounded when they are read.

    Args: gate_type: of the weights of vector gates.
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
