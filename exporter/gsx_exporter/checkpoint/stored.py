"""Stored tensors, under the names that transformers' own module gives them, whatever is stored.

Tensors are read one at a time from mapped files, so that a model larger than memory can be read. What must be computed
first (an adapter merged, quantized weights made floats) wraps another `Tensors` and does it tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gsx_exporter.checkpoint.experts import Piece
from gsx_exporter.checkpoint.files import open_safetensors

if TYPE_CHECKING:
    import torch


def type_bytes(stored_type: str) -> int:
    """Bytes of a value in a float type, as safetensors calls it: "BF16"."""
    return int(stored_type.lstrip("BF")) // 8


class Tensors(Protocol):
    """Tensors by name. Names are those of transformers' own module, which `names` lists; others raise KeyError."""

    @property
    def names(self) -> Collection[str]:
        """All names."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them, sorted: the same bytes in them are the same tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; only headers are read."""
        ...

    def stored_type(self, name: str) -> str:
        """The narrowest type that holds the tensor, as safetensors writes it ("F32", "BF16"); only headers are read."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in that type."""
        ...


@dataclass
class StoredTensors:
    """Tensors as safetensors files hold them.

    Args:
        places: name, as transformers calls it -> the file that holds it, and its name there.
        pieces: of those that are a part of a stored tensor -> which part.
    """

    places: Mapping[str, tuple[Path, str]]
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> Collection[str]:
        """See `Tensors`."""
        return self.places.keys()

    @property
    def files(self) -> Sequence[Path]:
        """See `Tensors`."""
        return sorted({file for file, _ in self.places.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        shape = tuple(self._slice(name).get_shape())
        piece = self.pieces.get(name)
        if piece is None:
            return shape
        return (shape[1] if piece.rows is None else piece.rows[1] - piece.rows[0], *shape[2:])

    def stored_type(self, name: str) -> str:
        """See `Tensors`."""
        return str(self._slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """See `Tensors`."""
        file, stored = self.places[name]
        piece = self.pieces.get(name)
        found: torch.Tensor
        if piece is None:
            found = self._handle(file).get_tensor(stored)
        else:
            rows = slice(None) if piece.rows is None else slice(*piece.rows)
            found = self._slice(name)[piece.expert, rows]
        return found

    def _slice(self, name: str) -> Any:
        file, stored = self.places[name]
        return self._handle(file).get_slice(stored)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = open_safetensors(file)
        return self._open[file]
