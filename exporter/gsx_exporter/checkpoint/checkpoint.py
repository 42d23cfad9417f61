"""A checkpoint, open for reading: its configuration and its tensors, checked against each other.

Weights are read only from safetensors: no pickle, no remote code. Tensors are read one at a time from the mapped
file, so a model larger than memory can still be exported. Gate tensors and the `"gsx"` section are described in
docs/design.md, section 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.experts import Piece
from gsx_exporter.checkpoint.files import open_safetensors
from gsx_exporter.checkpoint.names import COMPANION_FILES
from gsx_exporter.checkpoint.parameters import stored_as
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


@dataclass
class Checkpoint:
    """A model directory, checked and open for reading.

    Args:
        directory: where it is stored.
        source: the name that the user gave (a path or a hub id).
        hf_config: the transformers configuration object.
        config: the part of it that the exporter needs.
        files: tensor name, as transformers calls it -> file that holds it.
        renamed: of the tensors that have another name in the files: the same names -> names there.
        pieces: tensors that are stored as a part of another one -> which part.
        notes: what is unusual about the directory and how it was understood, each a sentence for the user.
        tokenizer: its tokenizer, once `load_tokenizer` has read it.
    """

    directory: Path
    source: str
    hf_config: Any
    config: ModelConfig
    files: dict[str, Path]
    renamed: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; only the header is read."""
        shape = tuple(self._slice(name).get_shape())
        piece = self.pieces.get(name)
        if piece is None:
            return shape
        return (shape[1] if piece.rows is None else piece.rows[1] - piece.rows[0], *shape[2:])

    def stored_type(self, name: str) -> str:
        """Type of a tensor as safetensors writes it ("F32", "BF16"); only the header is read."""
        return str(self._slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name.
        """
        piece = self.pieces.get(name)
        if piece is None:
            return self._handle(name).get_tensor(self.renamed.get(name, name))
        rows = slice(None) if piece.rows is None else slice(*piece.rows)
        part: torch.Tensor = self._slice(name)[piece.expert, rows]
        return part

    def parameter(self, name: str) -> torch.Tensor:
        """One parameter of the decoder, by its name there, with the prefix of a whole model's (`parameters.py`).

        Returns: it in its stored type; in float32 at least where it is not stored as it is.
        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        stored = stored_as(self.config, name)
        found = self.tensor(stored.tensor)
        if stored.rows is not None:
            found = found[slice(*stored.rows)]
        if (stored.offset, stored.factor) != (0.0, 1.0):
            found = (found.to(_at_least_float32(found)) + stored.offset) * stored.factor
        return found

    def weight_bytes(self) -> int:
        """Bytes that all tensors would take as 32-bit floats."""
        total = 0
        for name in self.files:
            count = 1
            for size in self.shape(name):
                count *= size
            total += 4 * count
        return total

    def weights_sha256(self) -> str:
        """Hash over the bytes of the weight files, in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def companions(self, names: Iterable[str] = COMPANION_FILES) -> Iterator[Path]:
        """The configuration and tokenizer files that the model has, of those with these names."""
        for name in names:
            path = self.directory / name
            if path.is_file():
                yield path

    def _slice(self, name: str) -> Any:
        """The stored tensor that a tensor is, or is a part of; its header or parts of it can be read."""
        piece = self.pieces.get(name)
        return self._handle(name).get_slice(self.renamed.get(name, name) if piece is None else piece.tensor)

    def _handle(self, name: str) -> Any:
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.source}: the weights have no tensor {name}",
                expected=f"a {self.config.family} model with {self.config.num_layers} layers",
                todo="the checkpoint does not fit its config.json",
            )
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)
