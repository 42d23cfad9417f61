"""What 8-bit numbers stand for, and which matrices of a decoder there are.

Quantization is symmetric throughout: zero-point 0, value = scale x code. Weights have a scale for each output channel;
activations have one for the whole tensor, found on text. That is what TensorRT, ONNX Runtime and other runtimes have
fast products for (docs/quantization.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsx_engines.bundle.manifest import SchemeName
from gsx_exporter.config import BRANCHES, Branch

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
# The product of a gate that has a value for each channel, by branch: as large as one of attention's.
GATES: dict[Branch, str] = {branch: f"{branch}_gate.linear" for branch in BRANCHES}


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
        high_layers: how many of the first layers stay high where tokens skip branches, unless the user says
            otherwise. What is rounded there reaches every decision behind, and flips most (benchmarks/RESULTS.md).
        careful_layers: how many behind them have their weights alone in 8 bits, for the same reason.
    """

    name: SchemeName
    dtype: torch.dtype
    largest: float
    activations: bool
    smoothing: float
    high_layers: int
    careful_layers: int

    @property
    def is_float8(self) -> bool:
        """Whether the codes are FP8."""
        return self.dtype == torch.float8_e4m3fn

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """The type as ModelOpt writes it: bits, or (exponent, mantissa) bits."""
        return (4, 3) if self.is_float8 else 8


SCHEMES: dict[SchemeName, Scheme] = {
    "int8": Scheme("int8", torch.int8, 127.0, True, 0.8, 1, 0),
    "int8-weights": Scheme("int8-weights", torch.int8, 127.0, False, 0.0, 0, 0),
    "fp8": Scheme("fp8", torch.float8_e4m3fn, 448.0, True, 0.0, 1, 3),
}
# Of weights alone, whatever the rest is: E4M3 would round them more coarsely, and save nothing more.
WEIGHTS_ALONE = SCHEMES["int8-weights"]
