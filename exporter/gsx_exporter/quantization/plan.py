"""What is quantized, and with which scales.

A plan has the scales of activations. Those of weights are computed from the weights when they are written
(`quantize_weight`), so a plan does not need the whole model in memory.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.quantization.scheme import EMBEDDING, GATES, GROUPS, HEAD, LINEARS, WEIGHTS_ONLY, Scheme
from gsx_exporter.quantization.smoothing import smooth
from gsx_exporter.quantization.statistics import Statistics
from gsx_plugins.errors import UsageError

# Scale of a channel or tensor that is zero throughout: a scale must be above 0.
_SMALLEST = 2.0**-24  # the smallest number above 0 in half precision


@dataclass(frozen=True)
class QuantizationPlan:
    """How a model is quantized.

    Args:
        scheme: the way of quantizing.
        checkpoint: the tensors to write, smoothed if the scheme smooths.
        input_scales: matrix in 8 bits ("layers.0.mlp.up_proj", "lm_head") -> scale of its input; None if only its
            weights are quantized. Matrices that are not listed stay in full precision.
    """

    scheme: Scheme
    checkpoint: Checkpoint
    input_scales: Mapping[str, float | None]

    @property
    def kept_high(self) -> tuple[str, ...]:
        """The matrices that stay in full precision, in order."""
        return tuple(name for name in matrices_of(self.checkpoint.config) if name not in self.input_scales)

    def without(self, names: Collection[str]) -> QuantizationPlan:
        """The same plan, with these matrices in full precision too."""
        scales = {name: scale for name, scale in self.input_scales.items() if name not in names}
        return dataclasses.replace(self, input_scales=scales)

    def sparing(self) -> QuantizationPlan:
        """The same plan with more precision in the first layers, gates included: most decisions come after them."""
        high, weight_only = self.scheme.high_layers, self.scheme.weight_only_layers
        scales = dict(self.input_scales)
        for layer in range(high, high + weight_only):
            scales |= {name: None for name in (f"layers.{layer}.{linear}" for linear in LINEARS) if name in scales}
        first = {f"layers.{layer}.{name}" for layer in range(high) for name in (*LINEARS, *GATES.values())}
        return dataclasses.replace(self, input_scales=scales).without(first)

    def scheme_of(self, matrix: str) -> Scheme:
        """The scheme that a quantized matrix uses."""
        return WEIGHTS_ONLY if self.input_scales[matrix] is None else self.scheme


def make_plan(checkpoint: Checkpoint, scheme: Scheme, found: Statistics | None) -> QuantizationPlan:
    """A plan that quantizes every matrix; of gates and tables, only the weights.

    Args: found: statistics at the exported selection; None if the scheme quantizes only weights.
    """
    names = matrices_of(checkpoint.config)
    if not scheme.activations:
        return QuantizationPlan(scheme, checkpoint, dict.fromkeys(names))
    assert found is not None
    smoothed, inputs = smooth(checkpoint, found, scheme.smoothing)
    scales = {name: float(inputs[name].max()) / scheme.largest if name in inputs else None for name in names}
    return QuantizationPlan(scheme, smoothed, scales)


def matrices_of(config: ModelConfig) -> list[str]:
    """All matrices that can be quantized, in order: both tables, the linear layers and the gates.

    A scalar gate's weight is a vector, so it is not quantized. Nor is a table that embedding and head share: one needs
    a scale for each row, the other reads it transposed, and two copies in 8 bits take the space of one in 16.
    """
    names = (*_gates_of(config), *LINEARS)
    linears = [f"layers.{layer}.{name}" for layer in range(config.num_layers) for name in names]
    return linears if config.tied_head else [EMBEDDING, *linears, HEAD]


def _gates_of(config: ModelConfig) -> tuple[str, ...]:
    if config.gate is None or config.gate.kind != "vector":
        return ()
    return tuple(GATES[branch] for branch in config.gated_branches)


def groups_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Matrices that read the same values, by the group's name ("layers.0.mlp.gate_up"), in order."""
    gates = {name.removesuffix(".linear"): (name,) for name in _gates_of(config)}
    groups = {
        f"layers.{layer}.{group}": tuple(f"layers.{layer}.{name}" for name in linears)
        for layer in range(config.num_layers)
        for group, linears in {**gates, **GROUPS}.items()
    }
    return groups if config.tied_head else {EMBEDDING: (EMBEDDING,), **groups, HEAD: (HEAD,)}


def named(config: ModelConfig, patterns: Sequence[str]) -> list[str]:
    """The matrices that match patterns such as "layers.0", "layers.*.mlp.down", "layers.3.self_attn.o_proj", "lm_head".

    Raises:
        UsageError: a pattern that matches nothing.
    """
    groups = groups_of(config)
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in matrices_of(config) if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n, f"{pattern}.*")]
        hits += [n for group, linears in groups.items() if fnmatch.fnmatch(group, pattern) for n in linears]
        if not hits:
            raise UsageError(
                f"no layer is named {pattern!r}",
                expected="e.g. layers.0, layers.*.mlp.down, layers.3.self_attn.o_proj, lm_head; or auto, or none",
                todo=f"the model has layers.0 to layers.{config.num_layers - 1}, each with "
                + ", ".join((*GROUPS, *(name.removesuffix(".linear") for name in _gates_of(config))))
                + ("" if config.tied_head else f"; {EMBEDDING}; {HEAD}"),
            )
        found |= dict.fromkeys(hits)
    return [name for name in matrices_of(config) if name in found]


def scale_value(scale: float, dtype: torch.dtype) -> np.float32:
    """A scale as the graph stores it: rounded to the type of the activations, never 0."""
    return np.float32(torch.tensor(max(scale, _SMALLEST)).to(dtype).item())


def weight_scales(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Scale of each output channel: weight [in, out] float32 -> [out], in the type of the activations.

    For an embedding [rows, width], pass the transpose to get the scale of each row.
    """
    return (weight.abs().amax(dim=0) / scheme.largest).clamp(min=_SMALLEST).to(dtype)


def quantize_weight(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Codes of a weight: [in, out] float32 -> the same shape in the scheme's type; scales as in `weight_scales`."""
    codes = (weight / weight_scales(weight, scheme, dtype).float()).clamp(-scheme.largest, scheme.largest)
    return codes.round().to(scheme.dtype) if scheme.dtype == torch.int8 else codes.to(scheme.dtype)
