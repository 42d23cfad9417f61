"""A checkpoint, open for reading: its configuration and its tensors, checked against each other.

Weights are read only from safetensors: no pickle, no remote code. Tensors are read one at a time from the mapped
file, so a model larger than memory can still be exported. Gate tensors and the `"gsx"` section are described in
docs/design.md, section 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.checks import check_tensors, missing
from gsx_exporter.checkpoint.files import decoder_names, open_safetensors, weight_files
from gsx_exporter.checkpoint.folder import locate
from gsx_exporter.checkpoint.hf_config import read_config
from gsx_exporter.checkpoint.names import COMPANION_FILES, CONFIG
from gsx_exporter.checkpoint.skeleton import check_skeleton
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD
from gsx_exporter.config import ModelConfig

if TYPE_CHECKING:
    import torch


@dataclass
class Checkpoint:
    """A model directory, checked and open for reading.

    Args:
        directory: where it is stored.
        source: the name that the user gave (a path or a hub id).
        hf_config: the transformers configuration object.
        config: the part of it that the exporter needs.
        files: tensor name, as transformers calls it -> file that holds it.
        stored: the same names -> names in the files.
        notes: what is unusual about the directory and how it was understood, each a sentence for the user.
    """

    directory: Path
    source: str
    hf_config: Any
    config: ModelConfig
    files: dict[str, Path]
    stored: dict[str, str]
    notes: list[str] = field(default_factory=list)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; only the header is read."""
        return tuple(self._handle(name).get_slice(self.stored[name]).get_shape())

    def stored_type(self, name: str) -> str:
        """Type of a tensor as safetensors writes it ("F32", "BF16"); only the header is read."""
        return str(self._handle(name).get_slice(self.stored[name]).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name.
        """
        return self._handle(name).get_tensor(self.stored[name])

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

    def companions(self) -> Iterator[Path]:
        """The configuration and tokenizer files that the model has."""
        for name in COMPANION_FILES:
            path = self.directory / name
            if path.is_file():
                yield path

    def _handle(self, name: str) -> Any:
        path = self.files.get(name)
        if path is None:
            raise missing(self, name)
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model directory or a hub id, and check that it is complete and of a supported family.

    Args:
        model: a local directory, or a hub id such as "org/name" (needs a connection the first time).
    Raises:
        CheckpointError: the checkpoint is missing, empty, truncated, damaged or quantized; it is something else (an
            adapter, a GGUF file); it has only pickled weights or an unsupported family; a field of its configuration
            has no meaning; a tensor is missing or has the wrong shape; its gates are incomplete.
    """
    directory = locate(str(model))
    hf_config = read_config(directory)
    config = ModelConfig.from_hf(hf_config)
    files = weight_files(directory, getattr(hf_config, "transformers_weights", None))
    stored = decoder_names(files, str(model))
    by_name = {name: files[kept] for name, kept in stored.items()}
    checkpoint = Checkpoint(directory, str(model), hf_config, config, by_name, stored)
    if getattr(hf_config, "auto_map", None):
        checkpoint.notes.append(f"{CONFIG} names code of its own (auto_map), which is never run")
    _settle_head(checkpoint)
    check_tensors(checkpoint)
    check_skeleton(checkpoint)
    return checkpoint


def _settle_head(checkpoint: Checkpoint) -> None:
    """Whether embedding and head are one table: as transformers decides it, by the flag and by what is stored.

    With the flag set and both tables stored, they are one only if they are equal: a head that was trained separately
    is often saved beside a flag that nobody changed. If only one is stored, it serves as both.
    """
    files, stored = checkpoint.files, checkpoint.stored
    if not checkpoint.config.tied_head or HEAD not in files:
        return
    if EMBEDDING in files and not _equal(checkpoint, EMBEDDING, HEAD):
        checkpoint.config = replace(checkpoint.config, tied_head=False)
        checkpoint.notes.append(
            f"{CONFIG} says that embedding and head are one table, but two different ones are stored: both are used"
        )
        return
    files.setdefault(EMBEDDING, files[HEAD])
    stored.setdefault(EMBEDDING, stored[HEAD])
    del files[HEAD], stored[HEAD]


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    first, second = checkpoint.tensor(one), checkpoint.tensor(other)
    return first.dtype == second.dtype and bool((first == second).all())
