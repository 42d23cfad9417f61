"""Checkpoints on disk: finding, checking and reading a Hugging Face model directory.

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

from gsx_exporter.checkpoint.files import open_safetensors, weight_files
from gsx_exporter.checkpoint.folder import locate
from gsx_exporter.checkpoint.hf_config import already_quantized, read_config
from gsx_exporter.checkpoint.names import COMPANION_FILES
from gsx_exporter.checkpoint.tensors import expected_tensors, rule_module_kind
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
        files: tensor name -> file that holds it.
        notes: what is unusual about the directory and how it was understood, each a sentence for the user.
        tokenizer: its tokenizer, once `load_tokenizer` has read it.
    """

    directory: Path
    source: str
    hf_config: Any
    config: ModelConfig
    files: dict[str, Path]
    notes: list[str] = field(default_factory=list)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; only the header is read."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def stored_type(self, name: str) -> str:
        """Type of a tensor as safetensors writes it ("F32", "BF16"); only the header is read."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name.
        """
        return self._handle(name).get_tensor(name)

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


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model directory or a hub id, and check that it is complete and of a supported family.

    Args:
        model: a local directory, or a hub id such as "org/name" (needs a connection the first time).
    Raises:
        CheckpointError: the checkpoint is missing, empty, truncated or damaged; it has only pickled weights or an
            unsupported family; a tensor is missing or has the wrong shape; its gates are incomplete.
    """
    directory = locate(str(model))
    hf_config = read_config(directory)
    config = ModelConfig.from_hf(hf_config)
    checkpoint = Checkpoint(directory, str(model), hf_config, config, weight_files(directory))
    _check_tensors(checkpoint)
    return checkpoint


# Float types, as safetensors writes them.
_FLOATS = ("F16", "BF16", "F32", "F64")


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Check that every expected tensor exists and has its shape, and that gates and routers are complete and finite."""
    config = checkpoint.config
    expected = expected_tensors(config)
    for kind, todo in (
        ("gate", '{"gsx": {"gate": {"kind": ..., "branches": [...]}}}'),
        ("router", '{"gsx": {"router": {...}}}, as docs/routers.md shows it for the method,'),
        ("exit classifier", '{"gsx": {"exit_classifiers": [...]}} with the depths'),
    ):
        stray = [n for n in checkpoint.names if rule_module_kind(n) == kind and n not in expected]
        if stray:
            raise CheckpointError(
                f"{checkpoint.source}: has {kind}s that config.json does not mention",
                found=f"{len(stray)} such tensors, {stray[0]} first",
                todo=f"add {todo} to config.json (docs/checkpoints.md)",
            )
    for name, shape in expected.items():
        part = rule_module_kind(name)
        if name not in checkpoint.files:
            what = f"{part}s are incomplete" if part else "a tensor is missing"
            raise CheckpointError(f"{checkpoint.source}: {what}", expected=name, found="no such tensor")
        found = checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.source}: {name} has the wrong shape", expected=str(list(shape)), found=str(list(found))
            )
        if checkpoint.stored_type(name) not in _FLOATS:
            raise already_quantized(checkpoint.source, f"{name} in {checkpoint.stored_type(name)}")
    for name in expected:
        part = rule_module_kind(name)
        if part and not bool(checkpoint.tensor(name).isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.source}: {name} contains NaN or infinity",
                expected=f"finite {part}s",
                todo="the training run diverged: use an earlier checkpoint",
            )
