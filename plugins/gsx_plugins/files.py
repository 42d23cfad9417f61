"""Files and folders that appear whole or not at all, and the folder for data that can be recreated.

A file or folder is written beside its target, under a hidden name that ends in `.partial`, and renamed when it is
complete, so readers never see a part of it. If several processes write to the same target, each uses a name of its own,
and the last one to finish wins.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gsx_plugins.errors import GsxError

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


def cache_folder() -> Path:
    """The user's folder for data that gsx can recreate: `gsx` under `$XDG_CACHE_HOME`, or under `~/.cache`.

    A relative path in the variable is ignored, as the XDG base directory specification requires.
    `engines/cpp/src/files.cpp` does the same.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache") / "gsx"


@contextmanager
def writing_file(target: Path) -> Iterator[Path]:
    """A path to write a file to; the file replaces the target when the block succeeds.

    If the block fails or is interrupted, nothing is left behind, and the target stays as it was.

    Args:
        target: its folder must exist.
    Raises:
        OSError: the file cannot be written or renamed.
    """
    work = partial(target)
    try:
        yield work
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; it replaces the target when the block succeeds.

    If the block fails or is interrupted, nothing is left behind, and the target stays as it was.

    Args:
        target: a folder that exists there is replaced with all its content; its parent folder must exist.
    Raises:
        OSError: the folder cannot be created or renamed.
    """
    work = partial(target)
    work.mkdir()
    try:
        yield work
        replace_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def partial(target: Path) -> Path:
    """An unused name beside the target for something that is not complete yet."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")


def replace_folder(work: Path, target: Path, then: Callable[[], None] = lambda: None) -> None:
    """Rename a finished folder to the target, keeping the former content until that has succeeded.

    Args:
        work: the folder, named by `partial`.
        target: the folder that it replaces.
        then: called afterwards, as part of the replacement: if it fails, the former content is restored.
    """
    old = work.with_suffix(".old")
    try:
        _swap(work, target, old)
        then()
    except BaseException:
        if target.exists() and not work.exists():
            target.rename(work)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap(work: Path, target: Path, old: Path) -> None:
    while True:
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            work.rename(target)
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        # Another process has put its own folder there in the meantime, so the former content is out of date.
        shutil.rmtree(old, ignore_errors=True)


def check_room(folder: Path, needed_bytes: int, *, todo: str) -> None:
    """Refuse to begin something for which the disk has no room.

    Args:
        folder: a folder on the disk.
        needed_bytes: how much must be free.
        todo: what to do if it is not.
    Raises:
        GsxError: the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise GsxError(
            f"{folder}: not enough room on the disk",
            expected=f"{needed_bytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
            todo=todo,
        )


def disk_error(
    target: Path, error: OSError, *, todo: str = "free some space, or give another place with -o"
) -> GsxError:
    """The error for a failed write to a target, with the system's reason in words."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "no permission to write here",
        errno.EPERM: "no permission to write here",
        errno.ENOTDIR: "a part of the path is not a directory",
    }
    return GsxError(f"{target}: could not be written", found=reasons.get(error.errno or 0, str(error)), todo=todo)
