"""Adding engines to a bundle, whole or not at all, even if several builds do so at once or one is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gsx_engines.bundle.bundle import Bundle, open_bundle, write_manifest
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.errors import BundleError
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES
from gsx_plugins.files import check_room, disk_error, partial, replace_folder

_TODO = "free some space, or build on a copy of the bundle that can be written"


@contextmanager
def writing_engines(
    bundle: Bundle, name: str, needed_bytes: int
) -> Iterator[tuple[Path, Callable[[EngineEntry], None]]]:
    """A folder for engines, and a function that adds it to the bundle: it moves the folder and updates the manifest.

    If the block fails or is interrupted, the bundle stays as it was. Leftovers of killed builds are removed.

    Args:
        name: of the engines; others of that name are replaced.
        needed_bytes: refuse at once if the disk has less room.
    Raises:
        GsxError: the disk is full or not writable.
        BundleError: the bundle was exported again in the meantime.
    """
    home = bundle.directory / ENGINES
    try:
        check_room(bundle.directory, needed_bytes, todo="free some space; an engine is about as large as its weights")
        with _locked(bundle.directory):
            new_home = not home.exists()
            home.mkdir(exist_ok=True)
            _remove_leftovers(home)
            work = partial(home / name)
            work.mkdir()
            held = _hold(work)
    except OSError as error:
        raise disk_error(home, error, todo=_TODO) from error

    def finish(entry: EngineEntry) -> None:
        (work / ENGINE_FILE).write_text(entry.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with _locked(bundle.directory):
            manifest = open_bundle(bundle.directory).manifest  # another build may have added its engines
            if (manifest.graphs, manifest.weights) != (bundle.manifest.graphs, bundle.manifest.weights):
                raise _exported_again(bundle)
            engines = {**manifest.engines, name: entry}
            made = manifest.model_copy(update={"engines": engines})
            replace_folder(work, home / name, then=lambda: write_manifest(bundle.directory, made))

    try:
        yield work, finish
    except OSError as error:
        if not work.is_dir():
            raise _exported_again(bundle) from error
        raise disk_error(home, error, todo=_TODO) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(held)
        if new_home and home.is_dir():
            with _locked(bundle.directory):  # another build may be about to use it
                if not any(home.iterdir()):
                    home.rmdir()


def _exported_again(bundle: Bundle) -> BundleError:
    return BundleError(
        f"bundle {bundle.directory}: was replaced while its engines were built",
        expected="the graphs that it had when the build began",
        todo="gsx build again",
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the bundle, so that other builds wait here. (A file system without locks cannot: then nobody waits.)"""
    held = os.open(directory, os.O_RDONLY)
    try:
        _lock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _hold(folder: Path) -> int:
    """Mark a folder as in use until the descriptor is closed, or this process ends."""
    held = os.open(folder, os.O_RDONLY)
    _lock(held, fcntl.LOCK_EX)
    return held


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        return False
    return True


def _remove_leftovers(home: Path) -> None:
    """Remove the folders of builds that no longer run: nobody holds their locks."""
    for folder in home.glob(".*.partial"):
        held = os.open(folder, os.O_RDONLY)
        try:
            if _lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)
