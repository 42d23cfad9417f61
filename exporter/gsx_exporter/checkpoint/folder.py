"""From what the user names (a directory or a hub id) to a model directory on this machine."""

from __future__ import annotations

from pathlib import Path

from gsx_exporter.checkpoint.names import COMPANION_FILES, WEIGHTS_INDEX
from gsx_exporter.errors import CheckpointError


def locate(model: str) -> Path:
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file():
        if directory.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            todo = "a pickled checkpoint is converted first: gsx convert FILE.pt -o DIR"
        else:
            todo = "give the directory that holds config.json and model.safetensors"
        raise CheckpointError(f"{model}: is a file", expected="a model directory or a hub id", todo=todo)
    if directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such directory", expected="a model directory or a hub id")
    return _download(model)


def _download(model: str) -> Path:
    """Download a model into the hub's own cache: only configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*COMPANION_FILES, "*.safetensors", WEIGHTS_INDEX]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: neither a local directory nor a model that could be fetched from the hub",
            found=str(error).strip().splitlines()[0],
            todo="check the spelling and the connection, or give a local directory",
        ) from error


def listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "an empty directory"
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
