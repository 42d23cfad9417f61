"""Parts of a checkpoint that the reference reads besides Hugging Face's own model."""

from __future__ import annotations

from torch import nn

from gsx_exporter.checkpoint.checkpoint import Checkpoint


def linear(checkpoint: Checkpoint, name: str) -> nn.Linear:
    """A linear layer with bias, in float32, from the tensors `{name}.weight` [out, in] and `{name}.bias` [out]."""
    weight, bias = (checkpoint.tensor(f"{name}.{part}").float() for part in ("weight", "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return linear
