"""AWQ's layout (AutoAWQ, version GEMM): 4-bit codes packed along the outputs, eight to a word in an order of its own.

`qweight` [in, out / 8] int32, `qzeros` [groups, out / 8] int32, `scales` [groups, out]. weight = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gsx_exporter.checkpoint.layouts.packed import unpacked
from gsx_exporter.checkpoint.layouts.scaled import dequantized

if TYPE_CHECKING:
    import torch

_BITS = 4
# Output n of eight is in these bits of a word, counted in codes from the lowest.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Awq:
    """See `Layout`."""

    method: str = "AWQ"
    by_transformers: bool = False
    codes: str = "qweight"
    scales: str = "scales"
    others: tuple[str, ...] = ("qzeros",)

    def shape(self, parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """See `Layout`."""
        (width, words), (groups, columns) = parts[self.codes], parts[self.scales]
        out = words * len(_ORDER)
        if columns != out or width % groups or parts.get("qzeros") != (groups, words):
            raise ValueError(", ".join(f"{part} {list(shape)}" for part, shape in parts.items()))
        return out, width

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        codes, zeros = (_in_order(parts[part]).t() for part in (self.codes, "qzeros"))
        return dequantized(codes, parts[self.scales].t(), zeros)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Codes [n, out] of words [n, out / 8]."""
    codes = unpacked(words, _BITS).reshape(len(words), -1, len(_ORDER))
    return codes[..., list(_ORDER)].flatten(-2)
