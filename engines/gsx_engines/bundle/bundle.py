"""Opening and checking a bundle, and writing one, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gsx_engines.bundle.manifest import SCHEMA_VERSION, Manifest
from gsx_engines.errors import BundleError, GsxError, UsageError

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

    Raises:
        BundleError: not a bundle, an unreadable or edited manifest, a missing or changed file.
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


def check_room(directory: Path, needed_bytes: int, *, todo: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        GsxError: fewer bytes are free where the directory lies; todo: what to do then.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise GsxError(
            f"{directory}: not enough room on the disk",
            expected=f"{needed_bytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
            todo=todo,
        )


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
    _check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target.parent, needed_bytes, todo="free some space, or give another place with -o")
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise disk_error(target, error) from error
    try:
        os.chmod(work, 0o755)
        yield work
        put_in_place(work, target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `gsx.json`; where there was one, it stays until the new one is complete."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"
    work = directory / f".{MANIFEST}.partial"
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(directory / MANIFEST)
    finally:
        work.unlink(missing_ok=True)


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


def _check_target(target: Path, overwrite: bool) -> None:
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


def put_in_place(work: Path, target: Path, then: Callable[[], None] = lambda: None) -> None:
    """Rename the finished directory to the target, keeping what was there until that has happened.

    Args:
        then: what belongs to it: if it fails, what was there is there again.
    """
    old = work.with_suffix(".old")
    try:
        if target.exists():
            target.rename(old)
        work.rename(target)
        then()
    except BaseException:
        if target.exists() and not work.exists():
            target.rename(work)
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def disk_error(
    target: Path, error: OSError, *, todo: str = "free some space, or give another place with -o"
) -> GsxError:
    """What the system said about writing to a place, in words."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "no permission to write here",
        errno.EPERM: "no permission to write here",
        errno.ENOTDIR: "a part of the path is not a directory",
    }
    return GsxError(f"{target}: could not be written", found=reasons.get(error.errno or 0, str(error)), todo=todo)
