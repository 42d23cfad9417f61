"""What 8-bit numbers stand for, and which matrices of a decoder there are.

Quantization is symmetric throughout: zero-point 0, value = scale x code. Weights have a scale for each output channel;
activations have one for the whole tensor, found on text. That is what TensorRT, ONNX Runtime and other runtimes have
fast products for (docs/quantization.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

SchemeName = Literal["int8", "int8-weights", "fp8"]

# The linear layers of a decoder layer that read the same values, by the name of the group.
GROUPS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
LINEARS = tuple(linear for linears in GROUPS.values() for linear in linears)
# The tables before and after the layers: rows are read from one, the head multiplies with the other.
EMBEDDING, HEAD = "embed_tokens", "lm_head"
TABLES = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Scheme:
    """A way of quantizing.

    Args:
        name: as the manifest and the command line have it.
        dtype: of the codes.
        largest: largest magnitude of a code. INT8 leaves -128 out, so that negation is exact.
        activations: whether activations are quantized too, or weights alone.
        smoothing: SmoothQuant's alpha, the share of a channel's size that moves from activations to weights; 0: none.
            FP8 needs none: its codes are dense near zero, so that a large channel does not cost the others their bits.
        spared_layers: how many of the first layers stay high where tokens skip branches, unless the user says
            otherwise. What is rounded there reaches every decision behind, and flips most (benchmarks/RESULTS.md).
    """

    name: SchemeName
    dtype: torch.dtype
    largest: float
    activations: bool
    smoothing: float
    spared_layers: int

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """The type as ModelOpt writes it: bits, or (exponent, mantissa) bits."""
        return (4, 3) if self.dtype == torch.float8_e4m3fn else 8


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("int8", torch.int8, 127.0, True, 0.8, 1),
    "int8-weights": Scheme("int8-weights", torch.int8, 127.0, False, 0.0, 0),
    "fp8": Scheme("fp8", torch.float8_e4m3fn, 448.0, True, 0.0, 2),
}
# Of the tables, whatever the rest is: a scale for each row of the embedding, and for each output channel of the head.
# (E4M3 weights alone would round as coarsely as E4M3 products do, and save nothing more.)
TABLE_SCHEME = SCHEMES["int8-weights"]


def scheme_of(matrix: str, scheme: Scheme) -> Scheme:
    """What a matrix is quantized with in a model that a scheme is for."""
    return TABLE_SCHEME if matrix in TABLES else scheme
