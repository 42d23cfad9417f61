"""Files and folders that appear whole or not at all, and where what can be made again is kept.

What is written stands beside its place, under a hidden name that ends in `.partial`, until it is complete; then it is
renamed. Readers never see a part of it. Where several write to one place at once, each has a name of its own, and the
last one to finish stays.
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
    """Where this user's gsx keeps what can be made again: `gsx` below `$XDG_CACHE_HOME`, or below `~/.cache`.

    A relative path in the variable is ignored, as the XDG base directory specification asks.
    `engines/cpp/src/files.cpp` does the same.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache") / "gsx"


@contextmanager
def writing_file(target: Path) -> Iterator[Path]:
    """A path to write a file to, which replaces the target when the block ends well.

    If the block fails or is interrupted, nothing is left and the target is as it was.

    Args:
        target: its folder exists.
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
    """An empty folder to fill, which replaces the target when the block ends well.

    If the block fails or is interrupted, nothing is left and the target is as it was.

    Args:
        target: a folder there is replaced, with all that it holds; the folder around it exists.
    Raises:
        OSError: the folder cannot be made or renamed.
    """
    work = partial(target)
    work.mkdir()
    try:
        yield work
        replace_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def partial(target: Path) -> Path:
    """A name beside the target that nothing has, for what is not complete yet."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")


def replace_folder(work: Path, target: Path, then: Callable[[], None] = lambda: None) -> None:
    """Rename a finished folder to the target, keeping what was there until that has happened.

    Args:
        work: as `partial` names it.
        then: what belongs to it: if it fails, what was there is there again.
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
        # Another writer has put its own there in between: what was there before is out of date.
        shutil.rmtree(old, ignore_errors=True)


def check_room(folder: Path, needed_bytes: int, *, todo: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        GsxError: fewer bytes are free on the disk of the folder; todo: what to do then.
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
    """What the system said about writing to a place, in words."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "no permission to write here",
        errno.EPERM: "no permission to write here",
        errno.ENOTDIR: "a part of the path is not a directory",
    }
    return GsxError(f"{target}: could not be written", found=reasons.get(error.errno or 0, str(error)), todo=todo)
