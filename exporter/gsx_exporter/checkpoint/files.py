"""The weight files of a model directory: which file holds which tensor, and under which name.

The rules are those of transformers' `from_pretrained` (modeling_utils.py, `_get_resolved_checkpoint_files`; names:
core_model_loading.py, `rename_source_key`), so that the same tensors are found in the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gsx_exporter.checkpoint.json_file import read_json
from gsx_exporter.checkpoint.kinds import without_weights
from gsx_exporter.checkpoint.names import WEIGHTS, WEIGHTS_INDEX
from gsx_exporter.errors import CheckpointError
from gsx_plugins.progress import OnProgress, Progress, silent

if TYPE_CHECKING:
    import torch

# Of the decoder without its head; a checkpoint of the decoder only stores its tensors without it.
_DECODER = "model."
_DECODER_PARTS = ("embed_tokens.", "layers.", "norm.")
# Where multimodal models store their text part (transformers 5, and 4), and what a decoder calls the same.
WHOLE_TO_TEXT = {
    "model.language_model.": _DECODER,
    "language_model.model.": _DECODER,
    "language_model.lm_head.": "lm_head.",
    "model.text_model.": _DECODER,
    "lm_head.": "lm_head.",
}


def weight_files(directory: Path, only: str | None = None) -> dict[str, Path]:
    """Tensor name, as it is stored -> file. Only headers are read, which also finds truncated files.

    A single `model.safetensors` comes first: an index beside it is left over from an earlier save. Of an index only
    the names of the shards are used: all that they hold counts, whether the index mentions it or not.

    Args: only: the file or index to read (`transformers_weights` of config.json); None to look for it.
    Raises:
        CheckpointError: there are no weights, or a file is missing or damaged.
    """
    if only is not None:
        path = directory / str(only)
        if path.name != only or not path.is_file():
            raise CheckpointError(
                f"{directory}: transformers_weights of config.json names no file in this directory", found=repr(only)
            )
        return _sharded(directory, path) if path.suffix == ".json" else _single(path)
    if (directory / WEIGHTS).is_file():
        return _single(directory / WEIGHTS)
    if (directory / WEIGHTS_INDEX).is_file():
        return _sharded(directory, directory / WEIGHTS_INDEX)
    raise without_weights(directory)


def decoder_names(files: Mapping[str, Path], source: str, *, of_whole: bool = False) -> dict[str, str]:
    """Tensor name, as transformers calls it -> as it is stored.

    The decoder only is stored without `model.` (AutoModel, embedding models); a wrapped model with one more.

    Args: of_whole: whether the decoder is the text part of a multimodal model; only its tensors are named then.
    Raises:
        CheckpointError: two tensors have the same name.
    """
    names: dict[str, str] = {}
    for stored in files:
        name = text_name(stored) if of_whole else canonical_name(stored)
        if name is None:
            continue
        if name in names:
            raise CheckpointError(f"{source}: has two tensors for {name}", found=f"{names[name]} and {stored}")
        names[name] = stored
    return names


def text_name(stored: str) -> str | None:
    """The name of a tensor of a multimodal model's text part; None if it belongs to another part."""
    return next((new + stored.removeprefix(old) for old, new in WHOLE_TO_TEXT.items() if stored.startswith(old)), None)


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of a directory of them, whatever the model is.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    files = weight_files(path) if path.is_dir() else _single(path)
    handles = {file: open_safetensors(file) for file in set(files.values())}
    return {name: handles[file].get_tensor(name) for name, file in files.items()}


def sha256_of_files(paths: Sequence[Path], more: str = "", on_progress: OnProgress = silent) -> str:
    """Hash over the bytes of files, one after the other, and of a text."""
    digest = hashlib.sha256()
    done, total = 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                done += len(block)
                on_progress(Progress("hashing the source weights", done, total, unit="bytes"))
    digest.update(more.encode())
    return digest.hexdigest()


def open_safetensors(path: Path) -> Any:
    """A file, mapped; tensors are read when they are asked for.

    Raises:
        CheckpointError: it is not a safetensors file, or it is incomplete.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not a complete safetensors file",
            found=f"{path.stat().st_size} bytes, {error}",
            todo="copy or download it again",
        ) from error


def _single(path: Path) -> dict[str, Path]:
    return dict.fromkeys(open_safetensors(path).keys(), path)


def _sharded(directory: Path, index: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name in _shards(index):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names a file outside the model directory", found=name)
        shard = directory / name
        if not shard.is_file():
            raise CheckpointError(
                f"{directory}: a shard of the weights is missing",
                expected=f"{name}, which {index.name} names",
                todo="copy or download the model again",
            )
        for tensor in open_safetensors(shard).keys():  # noqa: SIM118 - a handle of safetensors, not a dict
            if tensor in files:
                raise CheckpointError(
                    f"{directory}: two shards hold {tensor}", found=f"{files[tensor].name} and {name}"
                )
            files[tensor] = shard
    return files


def _shards(index: Path) -> list[str]:
    """Names of the shards that an index mentions, sorted."""
    raw = read_json(index)
    if "metadata" not in raw:
        raise CheckpointError(
            f"{index}: has no metadata, and transformers does not read an index without it",
            todo='add "metadata": {}, or save the model again',
        )
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index}: is not a safetensors index",
            expected="weight_map, an object of tensor names and file names",
            found=repr(weight_map)[:80],
        )
    return sorted(set(weight_map.values()))


def canonical_name(stored: str) -> str:
    """The name that transformers gives a tensor, from the one under which it is stored."""
    inner = stored.removeprefix(_DECODER)
    if inner != stored and inner.startswith((_DECODER, "lm_head.")):
        return inner
    return _DECODER + stored if stored.startswith(_DECODER_PARTS) else stored
