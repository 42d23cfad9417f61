"""The quantization schemes, the formats of weights, and the names of a decoder's matrices.

8 bits are symmetric: zero-point 0, value = scale x code. Weights have a scale for each output channel, or for each
block of inputs where only weights are quantized; activations have one for the whole tensor, calibrated on text. 4 bits
are only for weights, in blocks with a scale and a zero-point each. TensorRT, ONNX Runtime and other runtimes have fast
products for this (docs/quantization.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsx_engines.bundle.manifest import SchemeName
from gsx_engines.bundle.tensor_names import DRAFT_HEAD
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.graph.weights import FOUR_BITS

# Groups of a decoder layer's linear layers that read the same values, by name.
GROUPS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
# The tables before and after the layers: rows are read from one, the head multiplies by the other; and rows of the head
# for a draft that chooses among few tokens, which have the head's form.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
TABLES = (EMBEDDING, HEAD, DRAFT_HEAD)
# The linear layer of a vector gate, by branch: as large as one of attention's.
GATES: dict[Branch, str] = {branch: f"{branch}_gate.linear" for branch in BRANCHES}


@dataclass(frozen=True)
class WeightFormat:
    """How a weight [in, out] is stored: value = scale x (code - zero-point).

    Args:
        dtype: of the codes.
        largest: largest magnitude of a code. INT8 does not use -128, so that negation is exact; INT4 uses -8.
        block_size: how many neighbouring inputs of an output channel share a scale; None: all of them.
        zero_points: whether each block has a zero-point; else it is 0.
    """

    dtype: torch.dtype
    largest: float
    block_size: int | None = None
    zero_points: bool = False

    def fits(self, width: int) -> bool:
        """Whether an input width consists of whole blocks, as TensorRT requires."""
        return self.block_size is None or width % self.block_size == 0


INT8 = WeightFormat(torch.int8, 127.0)
E4M3 = WeightFormat(torch.float8_e4m3fn, 448.0)
# Where only weights are in 8 bits: the scales take an eighth of the bytes more, and the weights of SmolLM2 have a
# quarter of the divergence (benchmarks/RESULTS.md).
INT8_BLOCKS = WeightFormat(torch.int8, 127.0, 32)
INT4 = WeightFormat(FOUR_BITS, 7.0, 32, zero_points=True)


@dataclass(frozen=True)
class Scheme:
    """A way of quantizing.

    Args:
        name: as in the manifest and on the command line.
        weights: format of the weights of the layers' products. Products that lose too much in this scheme have INT8
            weights in blocks, and inputs in full precision; tables and gates have INT8 weights.
        activations: whether activations are quantized too, in the same type; False for only weights.
        smoothing: SmoothQuant's alpha, the share of a channel's size that moves from activations to weights; 0 for no
            smoothing. FP8 needs none: its codes are dense near zero, so a large channel does not cost the others bits.
            INT4 uses it as AWQ does: weights that read large channels are rounded with a finer step.
        high_layers: number of first layers that stay in full precision if tokens skip branches, unless the user says
            otherwise. Rounding there affects every later decision, and flips most (benchmarks/RESULTS.md).
        weight_only_layers: number of layers after them in which only weights are quantized, to INT8, for the same
            reason.
    """

    name: SchemeName
    weights: WeightFormat
    activations: bool
    smoothing: float
    high_layers: int
    weight_only_layers: int

    @property
    def is_float8(self) -> bool:
        """Whether the codes are FP8."""
        return self.weights == E4M3

    @property
    def reads_inputs(self) -> bool:
        """Whether the sizes of inputs must be known: for their scales, or for smoothing."""
        return self.activations or self.smoothing > 0

    @property
    def chosen_on_text(self) -> bool:
        """Whether the codes of weights are chosen on a text. Blocks of INT8 lose next to nothing when they are rounded
        to the nearest code."""
        return self.weights != INT8_BLOCKS

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """The type of activations as ModelOpt expects it: bits, or (exponent, mantissa) bits."""
        return (4, 3) if self.is_float8 else 8


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("int8", INT8, True, 0.8, 1, 0),
    "int8-weights": Scheme("int8-weights", INT8_BLOCKS, False, 0.0, 0, 0),
    "fp8": Scheme("fp8", E4M3, True, 0.0, 1, 3),
    "int4": Scheme("int4", INT4, False, 0.5, 1, 0),
}
