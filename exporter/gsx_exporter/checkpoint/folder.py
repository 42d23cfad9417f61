"""From what the user names (a directory or a hub id) to a model directory on this machine."""

from __future__ import annotations

from pathlib import Path

from gsx_exporter.checkpoint.gguf_file import GGUF
from gsx_exporter.checkpoint.kinds import PICKLES, check_kind
from gsx_exporter.checkpoint.names import ADAPTER, COMPANION_FILES, WEIGHTS_INDEX
from gsx_exporter.checkpoint.quantized import QUANTIZER_FILES
from gsx_exporter.errors import CheckpointError


def locate(model: str, revision: str | None = None) -> Path:
    """The directory of a model, or a GGUF file: as it is given, or from the hub's cache, downloaded the first time.

    Args: revision: a branch, tag or commit of the hub; None for the newest.
    Raises:
        CheckpointError: there is no such directory, or it is something else than a transformers checkpoint.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        check_kind(directory)
        return directory
    if directory.is_file() and directory.suffix == GGUF:
        return directory
    if directory.is_file():
        raise CheckpointError(
            f"{model}: is a file", expected="a model directory or a hub id", todo=_way_out_of_a_file(directory.suffix)
        )
    if directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such directory", expected="a model directory or a hub id")
    return _download(model, revision)


def _way_out_of_a_file(suffix: str) -> str:
    if suffix in PICKLES:
        return "a pickled checkpoint is converted first: gsx convert FILE.pt -o DIR"
    return "give the directory that holds config.json and model.safetensors"


def _download(model: str, revision: str | None) -> Path:
    """Download a model into the hub's own cache: only configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*COMPANION_FILES, ADAPTER, *QUANTIZER_FILES, "*.safetensors", WEIGHTS_INDEX]
    try:
        directory = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: neither a local directory nor a model that could be fetched from the hub",
            found=str(error).strip().splitlines()[0],
            todo="check the spelling and the connection, or give a local directory",
        ) from error
    check_kind(directory)
    return directory
