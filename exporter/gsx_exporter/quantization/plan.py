"""What is quantized, and how.

A plan has the scales of activations. The codes of weights are computed when they are written (`encoded`), or were
chosen on a text before and are in files (`ChosenCodes`), so a plan does not need the whole model in memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gsx_engines.bundle.tensor_names import DRAFT_HEAD
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.quantization.chosen import ChosenCodes
from gsx_exporter.quantization.codes import SMALLEST_SCALE, Encoded, round_to_nearest
from gsx_exporter.quantization.layers import groups_in, input_width, is_routed, products_in
from gsx_exporter.quantization.scheme import (
    EMBEDDING,
    GATES,
    HEAD,
    INT8,
    INT8_BLOCKS,
    TABLES,
    Scheme,
    WeightFormat,
)
from gsx_exporter.quantization.smoothing import smooth
from gsx_exporter.quantization.statistics import Statistics
from gsx_plugins.errors import UsageError


@dataclass(frozen=True)
class Matrix:
    """How a matrix is quantized.

    Args:
        format: of its weights.
        input_scale: scale of its input; None if only the weights are quantized.
    """

    format: WeightFormat
    input_scale: float | None = None


@dataclass(frozen=True)
class QuantizationPlan:
    """How a model is quantized.

    Args:
        scheme: the way of quantizing.
        checkpoint: the tensors to write, smoothed if the scheme smooths.
        matrices: those that are quantized ("layers.0.mlp.up_proj", "lm_head"); the others stay in full precision.
        chosen: codes that were chosen on a text; a matrix without is rounded to the nearest code.
    """

    scheme: Scheme
    checkpoint: Checkpoint
    matrices: Mapping[str, Matrix]
    chosen: ChosenCodes = field(default_factory=ChosenCodes)

    @property
    def kept_high(self) -> tuple[str, ...]:
        """The matrices that stay in full precision, in order."""
        return tuple(name for name in matrices_of(self.checkpoint.config) if name not in self.matrices)

    @property
    def weights_only(self) -> tuple[str, ...]:
        """The products of layers that have INT8 weights and inputs in full precision, although the scheme has other
        weights or rounds inputs, in order."""
        if self.scheme.weights == INT8_BLOCKS:
            return ()
        products = set(_products_of(self.checkpoint.config))
        return tuple(n for n, one in self.matrices.items() if n in products and one == self._spared(n))

    def with_draft_head(self) -> QuantizationPlan:
        """The same plan, in which a draft's rows of the head are quantized if the head is, and as it is."""
        head = EMBEDDING if self.checkpoint.config.tied_head else HEAD
        own = {DRAFT_HEAD: self.matrices[head]} if head in self.matrices else {}
        return replace(self, matrices={**self.matrices, **own})

    def without(self, names: Collection[str]) -> QuantizationPlan:
        """The same plan, with these matrices in full precision too."""
        return replace(self, matrices={name: one for name, one in self.matrices.items() if name not in names})

    def sparing(self, names: Collection[str]) -> QuantizationPlan:
        """The same plan, with only the weights of these matrices quantized, to INT8."""
        return replace(self, matrices=dict(self.matrices) | {n: self._spared(n) for n in names if n in self.matrices})

    def can_spare(self, linear: str) -> bool:
        """Whether `sparing` would change a product of a layer."""
        return linear in self.matrices and self.matrices[linear] != self._spared(linear)

    def _spared(self, linear: str) -> Matrix:
        whole_blocks = INT8_BLOCKS.fits(input_width(self.checkpoint.config, linear))
        return Matrix(INT8_BLOCKS if whole_blocks else INT8)

    def sparing_first(self) -> QuantizationPlan:
        """The same plan with more precision in the first layers, gates included: most decisions come after them."""
        config, high = self.checkpoint.config, self.scheme.high_layers
        last = min(high + self.scheme.weight_only_layers, config.stored_layers)
        first = {f"layers.{n}.{name}" for n in range(high) for name in (*products_in(config, n), *GATES.values())}
        after = [f"layers.{n}.{name}" for n in range(high, last) for name in products_in(config, n)]
        return self.sparing(after).without(first)

    def encoded(self, matrix: str, weight: Tensor, dtype: torch.dtype) -> Encoded:
        """The codes of a quantized matrix. Args: weight: [in, out]. dtype: of the scales."""
        form = self.matrices[matrix].format
        found = self.chosen.find(matrix, form)
        return found if found is not None else round_to_nearest(weight, form, dtype)


def make_plan(
    checkpoint: Checkpoint, scheme: Scheme, found: Statistics | None, chosen: ChosenCodes | None = None
) -> QuantizationPlan:
    """A plan that quantizes every matrix; of gates, tables and experts, only the weights.

    A product whose input is not a whole number of the format's blocks gets INT8 weights. So do experts in a scheme that
    rounds inputs.

    Args:
        found: statistics at the exported selection; None if the scheme reads none.
        chosen: where codes that are chosen on a text will be.
    """
    names = matrices_of(checkpoint.config)
    inputs: Mapping[str, np.ndarray] = {}
    if scheme.reads_inputs:
        assert found is not None
        checkpoint, inputs = smooth(checkpoint, found, scheme.smoothing)
    tables = Matrix(INT8_BLOCKS if INT8_BLOCKS.fits(checkpoint.config.hidden_size) else INT8)
    matrices = {name: tables if name in TABLES else Matrix(INT8) for name in names}
    for name in _products_of(checkpoint.config):
        width = input_width(checkpoint.config, name)
        if is_routed(name) and scheme.activations:
            matrices[name] = Matrix(INT8_BLOCKS if INT8_BLOCKS.fits(width) else INT8)
        elif scheme.weights.fits(width):
            scale = float(inputs[name].max()) / scheme.weights.largest if scheme.activations else None
            matrices[name] = Matrix(scheme.weights, scale)
    return QuantizationPlan(scheme, checkpoint, matrices, chosen or ChosenCodes())


def matrices_of(config: ModelConfig) -> list[str]:
    """All matrices that can be quantized, in order: both tables, the products of the layers and the gates.

    A scalar gate's weight is a vector, so it is not quantized. A table that embedding and head share counts as the
    embedding: it is stored once, with scales for each row, which is an output channel of the head.
    """
    gates = _gates_of(config)
    inside = [f"layers.{n}.{name}" for n in range(config.stored_layers) for name in (*gates, *products_in(config, n))]
    return [EMBEDDING, *inside] if config.tied_head else [EMBEDDING, *inside, HEAD]


def _products_of(config: ModelConfig) -> list[str]:
    """The products of all layers."""
    return [f"layers.{n}.{name}" for n in range(config.stored_layers) for name in products_in(config, n)]


def _gates_of(config: ModelConfig) -> tuple[str, ...]:
    if config.gate is None or config.gate.kind != "vector":
        return ()
    return tuple(GATES[branch] for branch in config.gated_branches)


def groups_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Matrices that read the same values, by the group's name ("layers.0.mlp.gate_up"), in order."""
    gates = {name.removesuffix(".linear"): (name,) for name in _gates_of(config)}
    groups = {
        f"layers.{layer}.{group}": tuple(f"layers.{layer}.{name}" for name in linears)
        for layer in range(config.stored_layers)
        for group, linears in {**gates, **groups_in(config, layer)}.items()
    }
    return {EMBEDDING: (EMBEDDING,), **groups, **({} if config.tied_head else {HEAD: (HEAD,)})}


def group_names(config: ModelConfig) -> tuple[str, ...]:
    """The names of the groups of products that the layers have, each once."""
    return tuple(dict.fromkeys(name for n in range(config.stored_layers) for name in groups_in(config, n)))


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
                expected="e.g. layers.0, layers.*.mlp.down, layers.3.self_attn.o_proj, lm_head; or none",
                todo=f"the model has layers.0 to layers.{config.stored_layers - 1}, each with "
                + ", ".join((*group_names(config), *(name.removesuffix(".linear") for name in _gates_of(config))))
                + f"; {EMBEDDING}"
                + ("" if config.tied_head else f"; {HEAD}"),
            )
        found |= dict.fromkeys(hits)
    return [name for name in matrices_of(config) if name in found]


def scale_value(scale: float, dtype: torch.dtype) -> np.float32:
    """A scale as the graph stores it: rounded to the type of the activations, never 0."""
    return np.float32(torch.tensor(max(scale, SMALLEST_SCALE)).to(dtype).item())
