"""A checkpoint, open for reading: its configuration and its tensors, checked against each other.

Weights are read only from safetensors: no pickle, no remote code. Tensors are read one at a time from the mapped
file, so a model larger than memory can still be exported. Gate tensors and the `"gsx"` section are described in
docs/design.md, section 5.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.adapter import Adapter
from gsx_exporter.checkpoint.files import sha256_of_files
from gsx_exporter.checkpoint.gguf_file import GgufFile
from gsx_exporter.checkpoint.json_file import read_json
from gsx_exporter.checkpoint.layouts.layout import Layout
from gsx_exporter.checkpoint.names import COMPANION_FILES, CONFIG, GENERATION_CONFIG, has_vocabulary
from gsx_exporter.checkpoint.parameters import Stored, stored_as
from gsx_exporter.checkpoint.stored import Tensors, type_bytes
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError
from gsx_plugins.progress import OnProgress, silent

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


@dataclass
class Checkpoint:
    """A model, checked and open for reading.

    Args:
        directory: where configuration and weights are stored: with an adapter, those of its base.
        source: the name that the user gave (a path or a hub id).
        hf_config: the transformers configuration object.
        config: the part of it that the exporter needs.
        stored: its tensors.
        notes: what is unusual about the directory and how it was understood, each a sentence for the user.
        adapter: the LoRA adapter that is merged into the tensors; None without one.
        own_config: what `config.json` would say of this model; None if the file in the directory says just that.
        whole: `model_type` of the multimodal model that this is the text part of; None if it is a model itself.
        layout: how the weights are quantized in the files; None if they are floats there too.
        gguf: the GGUF file that all is read from; None for a directory of transformers.
        tokenizer: its tokenizer, once `load_tokenizer` has read it.
    """

    directory: Path
    source: str
    hf_config: Any
    config: ModelConfig
    stored: Tensors
    notes: list[str] = field(default_factory=list)
    adapter: Adapter | None = None
    own_config: Mapping[str, Any] | None = None
    whole: str | None = None
    layout: Layout | None = None
    gguf: GgufFile | None = None
    tokenizer: Tokenizer | None = field(default=None, repr=False)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.stored.names)

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer's files are: an adapter may have its own."""
        own = self.adapter.directory if self.adapter is not None else None
        return own if own is not None and has_vocabulary(own) else self.directory

    @property
    def generation_directory(self) -> Path:
        """Where it is written how texts begin and end: an adapter may have a file of its own."""
        own = self.adapter.directory if self.adapter is not None else None
        return own if own is not None and (own / GENERATION_CONFIG).is_file() else self.directory

    def config_values(self) -> dict[str, Any]:
        """What `config.json` says of this model, as plain values."""
        return dict(self.own_config) if self.own_config is not None else read_json(self.directory / CONFIG)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; only headers are read."""
        return self.stored.shape(self._known(name))

    def stored_type(self, name: str) -> str:
        """The narrowest type that holds a tensor, as safetensors writes it ("F32", "BF16"); only headers are read."""
        return self.stored.stored_type(self._known(name))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in that type.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name.
        """
        return self.stored.tensor(self._known(name))

    def size(self, name: str) -> int:
        """Bytes of a tensor, in the type in which it is read."""
        return math.prod(self.shape(name)) * type_bytes(self.stored_type(name))

    def parameter(self, name: str) -> torch.Tensor:
        """One parameter of the decoder, by its name there, with the prefix of a whole model's (`parameters.py`).

        Returns: it in its tensor's type; in float32 at least where it is not stored as it is.
        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        return self._read(stored_as(self.config, name))

    def _read(self, stored: Stored) -> torch.Tensor:
        found = self.tensor(stored.tensor)
        if stored.rows is not None:
            found = found[slice(*stored.rows)]
        if not stored.is_changed:
            return found
        found = (found.to(_at_least_float32(found)) + stored.offset) * stored.factor
        if stored.form != "as it is":
            found = found.square() if stored.form == "square" else found.abs()
        if stored.channels is not None:  # rows of a matrix, or elements of its bias
            factors = self._read(stored.channels)
            found = found * (factors if found.ndim == 1 else factors[:, None])
        return found

    def parameter_type(self, name: str) -> str:
        """The narrowest type that holds a parameter of the decoder, as safetensors writes it; only headers are read."""
        stored = stored_as(self.config, name)
        return "F32" if stored.is_changed else self.stored_type(stored.tensor)

    def parameter_size(self, name: str) -> int:
        """Bytes of the tensor, or of the rows of one, that a parameter of the decoder is read from."""
        stored = stored_as(self.config, name)
        if stored.rows is None:
            return self.size(stored.tensor)
        first, last = stored.rows
        return self.size(stored.tensor) * (last - first) // self.shape(stored.tensor)[0]

    def weight_bytes(self) -> int:
        """Bytes that all tensors would take as 32-bit floats."""
        return sum(4 * math.prod(self.shape(name)) for name in self.stored.names)

    def weights_sha256(self, on_progress: OnProgress = silent) -> str:
        """Hash over the bytes of the weight files, in the order of their names, and how an adapter is merged."""
        settings = repr(self.adapter.settings) if self.adapter is not None else ""
        return sha256_of_files(self.stored.files, settings, on_progress)

    def companions(self, names: Iterable[str] = COMPANION_FILES) -> Iterator[Path]:
        """The configuration and tokenizer files that the model has, of those with these names."""
        folders = {CONFIG: self.directory, GENERATION_CONFIG: self.generation_directory}
        for name in names:
            path = folders.get(name, self.tokenizer_directory) / name
            if path.is_file():
                yield path

    def copy_companions(self, folder: Path, names: Iterable[str] = COMPANION_FILES) -> None:
        """Copy these files to a folder, where `config.json` says what this model is."""
        for path in self.companions(names):
            shutil.copyfile(path, folder / path.name)
        if self.own_config is not None:
            text = json.dumps(self.own_config, indent=2) + "\n"
            (folder / CONFIG).write_text(text, encoding="utf-8")

    def _known(self, name: str) -> str:
        if name not in self.stored.names:
            raise CheckpointError(
                f"{self.source}: the weights have no tensor {name}",
                expected=f"a {self.config.family} model with {self.config.stored_layers} layers",
                todo="the checkpoint does not fit its config.json",
            )
        return name


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    import torch

    return torch.promote_types(tensor.dtype, torch.float32)
