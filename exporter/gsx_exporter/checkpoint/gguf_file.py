"""GGUF files: configuration, names and layout as transformers reads them, tensors one at a time by the `gguf` library.

transformers reads such a file whole (modeling_gguf_pytorch_utils.py); here its tables of names and its undoing of
llama.cpp's order of rows are applied to each tensor when it is read. The reference loads the file by transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.near_miss import unknown_traits, way_out
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import FAMILIES

if TYPE_CHECKING:
    import torch

GGUF = ".gguf"
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_BEGIN, _VOCABULARY = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.model"
# What transformers' reader leaves out, so that it would compute another model: scaled rotary frequencies.
_LEFT_OUT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass
class GgufTensors:
    """The tensors of a GGUF file, as floats; see `Tensors`.

    Args:
        path: the file.
        reader: the file, open and mapped.
        stored: name, as transformers calls it -> tensor of the file.
        processor: transformers' undoing of the order in which llama.cpp keeps a tensor.
    """

    path: Path
    reader: Any
    stored: Mapping[str, Any]
    processor: Any

    @property
    def names(self) -> Collection[str]:
        """See `Tensors`."""
        return self.stored.keys()

    @property
    def files(self) -> Sequence[Path]:
        """See `Tensors`."""
        return [self.path]

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the tensors are stored, as GGUF calls it."""
        return tuple(sorted({tensor.tensor_type.name for tensor in self.reader.tensors}))

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        return tuple(int(size) for size in reversed(self.stored[name].shape))

    def stored_type(self, name: str) -> str:
        """See `Tensors`: whatever the file's type, its values are computed in float32."""
        return "F32"

    def tensor(self, name: str) -> torch.Tensor:
        """See `Tensors`."""
        import numpy as np
        import torch
        from gguf import dequantize

        found = self.stored[name]
        weights = dequantize(found.data, found.tensor_type)
        weights = self.processor.process(weights=weights, name=found.name).weights
        return torch.from_numpy(np.array(weights, dtype=np.float32))


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file of a supported family.

    Args:
        path: the file.
        values: what `config.json` would say of the model.
        tensors: its tensors.
        has_tokenizer: whether it has a vocabulary.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: GgufTensors = field(repr=False)
    has_tokenizer: bool


def find_gguf(place: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one of a directory without other weights; None if none.

    Raises:
        CheckpointError: the directory has several.
    """
    if place.is_file():
        return place if place.suffix == GGUF else None
    found = sorted(place.glob(f"*{GGUF}"))
    if not found or any(place.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{place}: has several GGUF files",
            expected="one",
            found=", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else ""),
            todo="give the file itself; one in parts must be joined first (llama-gguf-split --merge)",
        )
    return found[0]


def read_gguf(path: Path) -> GgufFile:
    """A GGUF file, its configuration read; its tensors are mapped.

    Raises:
        CheckpointError: it is damaged, its family is not supported, or it has what transformers' reader leaves out.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading a GGUF file needs the package gguf", todo='pip install "gsx[formats]"'
        ) from error
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            reader = GGUFReader(path)
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # both libraries raise many types, all about this file
        raise CheckpointError(f"{path}: transformers cannot read it", found=one_line(error)) from error
    values: dict[str, Any] = config.to_dict()
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {config.model_type!r} is not supported",
            expected="one of " + ", ".join(FAMILIES),
            found="; ".join(unknown_traits(values)) or None,
            todo=way_out(values),
        )
    _check_left_out(path, reader)
    ends = [number for key in _ENDS if (number := _number(reader, key)) is not None]
    values |= {"eos_token_id": list(dict.fromkeys(ends)) or None, "bos_token_id": _number(reader, _BEGIN)}
    vocabulary = reader.fields.get(_VOCABULARY)
    has_tokenizer = vocabulary is not None and vocabulary.contents() != "no_vocab"
    return GgufFile(path, {**values, "pad_token_id": None}, _tensors(path, reader, config), has_tokenizer)


def _check_left_out(path: Path, reader: Any) -> None:
    """Refuse a file of which transformers would make another model."""
    keys = [key for key in reader.fields if ".rope.scaling." in key]
    scaled = [key for key in keys if reader.fields[key].contents() not in ("none", 1.0)]
    scaled += [tensor.name for tensor in reader.tensors if tensor.name in _LEFT_OUT]
    if scaled:
        raise CheckpointError(
            f"{path}: has scaled rotary positions, which transformers does not read from a GGUF file",
            expected="plain RoPE",
            found=scaled[0],
            todo="export the original checkpoint",
        )


def _number(reader: Any, key: str) -> int | None:
    found = reader.fields.get(key)
    return None if found is None else int(found.contents())


def _tensors(path: Path, reader: Any, config: Any) -> GgufTensors:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = get_gguf_hf_weights_map(model, processor)
    stored = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    return GgufTensors(path, reader, stored, processor)
