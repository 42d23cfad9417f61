"""Opening and checking a bundle, and writing one, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gsx_engines.bundle.manifest import SCHEMA_VERSION, Manifest
from gsx_engines.errors import BundleError
from gsx_plugins.errors import UsageError
from gsx_plugins.files import check_room, disk_error, writing_file, writing_folder

MANIFEST = "gsx.json"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        directory: its folder.
        manifest: its checked `gsx.json`.
    """

    directory: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """Path of a graph's ONNX file.

        Raises:
            BundleError: the bundle has no such graph.
        """
        entry = self.manifest.graphs.get(name)
        if entry is None:
            raise BundleError(
                f"bundle {self.directory}: has no graph {name!r}", found=", ".join(sorted(self.manifest.graphs))
            )
        return self.directory / entry.file


def open_bundle(directory: str | Path, *, check_weights: bool = False) -> Bundle:
    """Open a bundle and check it against its manifest.

    Graphs are always checked by hash. The weights file may be large: it is checked by size, and by hash only if
    `check_weights` is set (`gsx verify` does so).

    Args:
        directory: what `gsx export` wrote.
        check_weights: hash the weights file too.
    Returns: the bundle, with its directory and its manifest.
    Raises:
        BundleError: not a bundle, an unreadable or edited manifest, a missing or changed file.
    Example:
        >>> gsx.open_bundle("out/demo").manifest.decoder.family
        'llama'
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{directory}: is not a bundle",
            expected=MANIFEST,
            found="no such directory" if not directory.is_dir() else "a directory without it",
            todo="gsx export MODEL -o OUT makes one",
        )
    bundle = Bundle(directory, _read_manifest(path))
    for entry in bundle.manifest.graphs.values():
        _check_hash(directory, entry.file, entry.sha256)
    weights = bundle.manifest.weights
    weights_path = directory / weights.file
    size = weights_path.stat().st_size if weights_path.is_file() else None
    if size != weights.size_bytes:
        raise BundleError(
            f"bundle {directory}: {weights.file} does not match {MANIFEST}",
            expected=f"{weights.size_bytes} bytes",
            found="no such file" if size is None else f"{size} bytes",
            todo="the file is incomplete or was replaced: copy it again, or run `gsx export` again",
        )
    if check_weights:
        _check_hash(directory, weights.file, weights.sha256)
    return bundle


@contextmanager
def writing(target: Path, *, overwrite: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """A directory to build a bundle in; it takes the target's place when the block ends well.

    If the block fails or is interrupted, nothing is left and what was at the target stays.

    Args:
        target: where the bundle is to appear.
        overwrite: whether something that is there may be replaced (only ever a bundle or an empty directory).
        needed_bytes: refuse at once where the disk has less room.
    Raises:
        UsageError: the target is occupied.
        GsxError: the disk is full or not writable.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent, needed_bytes, todo="free some space, or give another place with -o")
        with writing_folder(target) as work:
            yield work
    except OSError as error:
        raise disk_error(target, error) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `gsx.json`; where there was one, it stays until the new one is complete."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    with writing_file(directory / MANIFEST) as work:
        work.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: is not readable JSON", found=str(error)) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: was written in another format",
            expected=f"schema_version {SCHEMA_VERSION}",
            found=f"schema_version {version}",
            todo="run `gsx export` again with this version of gsx",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BundleError(
            f"{path}: is not a valid manifest ({error.error_count()} errors)",
            found=f"{place}: {first['msg']}",
            todo="the file was edited: restore it, or run `gsx export` again",
        ) from error


def _check_hash(directory: Path, name: str, expected: str) -> None:
    path = directory / name
    if not path.is_file():
        raise BundleError(f"bundle {directory}: {name} is missing", todo="restore it, or run `gsx export` again")
    found = sha256_of(path)
    if found != expected:
        raise BundleError(
            f"bundle {directory}: {name} does not match {MANIFEST}",
            expected=f"sha256 {expected[:12]}...",
            found=f"{found[:12]}...",
            todo="the file changed after export: restore it, or run `gsx export` again",
        )


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a place for a bundle that is occupied: only a bundle or an empty directory is ever replaced.

    Args: overwrite: whether a bundle may be replaced.
    Raises:
        UsageError: something else is there.
    """
    if target.is_dir():
        empty = not any(target.iterdir())
        if empty or (overwrite and (target / MANIFEST).is_file()):
            return
        raise UsageError(
            f"{target}: exists and is not empty",
            found="a bundle" if (target / MANIFEST).is_file() else "something that is not a bundle",
            todo=(
                "--overwrite replaces the bundle"
                if (target / MANIFEST).is_file()
                else "give another place with -o: gsx replaces bundles only"
            ),
        )
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target}: exists and is not a directory", todo="give another place with -o")
