"""The weight files of a model directory: which file holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gsx_engines.bundle.bundle import MANIFEST
from gsx_exporter.checkpoint.folder import listing
from gsx_exporter.checkpoint.names import WEIGHTS, WEIGHTS_INDEX
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file. Only headers are read, which also finds truncated files."""
    index = directory / WEIGHTS_INDEX
    single = directory / WEIGHTS
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{index}: is not a safetensors index", found=str(error)) from error
        files = {}
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{index}: names a file outside the model directory", found=name)
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory}: a shard of the weights is missing", expected=name)
        stored = {name: set(open_safetensors(directory / name).keys()) for name in set(weight_map.values())}
        for tensor, name in weight_map.items():
            if tensor not in stored[name]:
                raise CheckpointError(f"{directory / name}: lacks a tensor that the index promises", expected=tensor)
            files[tensor] = directory / name
        return files
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if (directory / MANIFEST).is_file():
        raise CheckpointError(
            f"{directory}: is a bundle, exported already",
            expected=f"a checkpoint, with {WEIGHTS} or {WEIGHTS_INDEX}",
            todo="give the model that it was exported from; gsx inspect shows it",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: has only pickled weights, and unpickling runs code",
            expected=WEIGHTS,
            found=", ".join(pickles[:3]),
            todo="save it as safetensors (model.save_pretrained), or use gsx convert for a GateSkip .pt",
        )
    raise CheckpointError(
        f"{directory}: has no weights", expected=f"{WEIGHTS} or {WEIGHTS_INDEX}", found=listing(directory)
    )


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not a complete safetensors file",
            found=f"{path.stat().st_size} bytes, {error}",
            todo="copy or download it again",
        ) from error


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of a directory of them, whatever the model is.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    files = weight_files(path) if path.is_dir() else dict.fromkeys(open_safetensors(path).keys(), path)
    handles = {file: open_safetensors(file) for file in set(files.values())}
    return {name: handles[file].get_tensor(name) for name, file in files.items()}
