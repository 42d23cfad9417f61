"""The quantization schemes, and the names of a decoder's matrices.

Quantization is always symmetric: zero-point 0, value = scale x code. Weights have a scale for each output channel;
activations have one for the whole tensor, calibrated on text. TensorRT, ONNX Runtime and other runtimes have fast
products for this (docs/quantization.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsx_engines.bundle.manifest import SchemeName
from gsx_engines.bundle.words import BRANCHES, Branch

# Groups of a decoder layer's linear layers that read the same values, by name.
GROUPS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
LINEARS = tuple(linear for linears in GROUPS.values() for linear in linears)
# The tables before and after the layers: rows are read from one, the head multiplies by the other.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
TABLES = (EMBEDDING, HEAD)
# The linear layer of a vector gate, by branch: as large as one of attention's.
GATES: dict[Branch, str] = {branch: f"{branch}_gate.linear" for branch in BRANCHES}


@dataclass(frozen=True)
class Scheme:
    """A way of quantizing.

    Args:
        name: as in the manifest and on the command line.
        dtype: of the codes.
        largest: largest magnitude of a code. INT8 does not use -128, so that negation is exact.
        activations: whether activations are quantized too; False for only weights.
        smoothing: SmoothQuant's alpha, the share of a channel's size that moves from activations to weights; 0 for no
            smoothing. FP8 needs none: its codes are dense near zero, so a large channel does not cost the others bits.
        high_layers: number of first layers that stay in full precision if tokens skip branches, unless the user says
            otherwise. Rounding there affects every later decision, and flips most (benchmarks/RESULTS.md).
        weight_only_layers: number of layers after them in which only weights are quantized, for the same reason.
    """

    name: SchemeName
    dtype: torch.dtype
    largest: float
    activations: bool
    smoothing: float
    high_layers: int
    weight_only_layers: int

    @property
    def is_float8(self) -> bool:
        """Whether the codes are FP8."""
        return self.dtype == torch.float8_e4m3fn

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """The type as ModelOpt expects it: bits, or (exponent, mantissa) bits."""
        return (4, 3) if self.is_float8 else 8


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("int8", torch.int8, 127.0, True, 0.8, 1, 0),
    "int8-weights": Scheme("int8-weights", torch.int8, 127.0, False, 0.0, 0, 0),
    "fp8": Scheme("fp8", torch.float8_e4m3fn, 448.0, True, 0.0, 1, 3),
}
# Used with every scheme where only weights are quantized: E4M3 would round them more coarsely and save nothing more.
WEIGHTS_ONLY = SCHEMES["int8-weights"]
