"""Files and folders appear whole or not at all: after an interruption, on a full disk, with two writers at once."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gsx_plugins.errors import GsxError
from gsx_plugins.files import (
    cache_folder,
    check_room,
    disk_error,
    partial,
    replace_folder,
    writing_file,
    writing_folder,
)

FULL = OSError(errno.ENOSPC, "No space left on device")
ROUNDS = 60


def file_of(target: Path, text: str, fail: BaseException | None = None) -> None:
    with writing_file(target) as work:
        work.write_text(text[: len(text) // 2])
        if fail is not None:
            raise fail
        work.write_text(text)


def folder_of(target: Path, text: str, fail: BaseException | None = None) -> None:
    with writing_folder(target) as work:
        (work / "first").write_text(text)
        if fail is not None:
            raise fail
        (work / "second").write_text(text)


def read_file(target: Path) -> set[str]:
    return {target.read_text()}


def read_folder(target: Path) -> set[str]:
    assert sorted(path.name for path in target.iterdir()) == ["first", "second"]
    return {path.read_text() for path in target.iterdir()}


Write = Callable[..., None]
Read = Callable[[Path], set[str]]
both = pytest.mark.parametrize(("write", "read"), [(file_of, read_file), (folder_of, read_folder)])


@both
@pytest.mark.parametrize("fail", [KeyboardInterrupt(), FULL, RuntimeError("a bug")])
def test_a_failure_leaves_nothing(tmp_path: Path, write: Write, read: Read, fail: BaseException) -> None:
    target = tmp_path / "out"
    with pytest.raises(type(fail)):
        write(target, "new", fail)
    assert list(tmp_path.iterdir()) == []
    write(target, "old")
    with pytest.raises(type(fail)):
        write(target, "new", fail)
    assert read(target) == {"old"}
    write(target, "new")
    assert read(target) == {"new"}
    assert list(tmp_path.iterdir()) == [target]


@both
def test_of_two_writers_the_last_one_stays(tmp_path: Path, write: Write, read: Read) -> None:
    target = tmp_path / "out"
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def run(text: str) -> None:
        try:
            start.wait()
            for _ in range(ROUNDS):
                write(target, text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(text,)) for text in ("one" * 1000, "two" * 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert read(target) in ({"one" * 1000}, {"two" * 1000})
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_comes_back_where_what_belongs_to_it_fails(tmp_path: Path) -> None:
    target, work = tmp_path / "out", partial(tmp_path / "out")
    folder_of(target, "old")
    work.mkdir()

    def fail() -> None:
        assert not work.exists()
        raise FULL

    with pytest.raises(OSError, match="No space"):
        replace_folder(work, target, then=fail)
    assert read_folder(target) == {"old"}
    assert work.is_dir(), "whoever made it removes it"
    assert sorted(tmp_path.iterdir()) == sorted([target, work])


def test_a_folder_stays_where_the_new_one_cannot_be_renamed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder_of(target, "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(partial(target), target)
    assert read_folder(target) == {"old"}
    assert list(tmp_path.iterdir()) == [target]


def test_modes_are_those_of_any_other_file(tmp_path: Path) -> None:
    """A temporary file's mode would be for this user only."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    folder_of(tmp_path / "folder", "text")
    file_of(tmp_path / "file", "text")
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain" / "file").stat().st_mode


def test_room_on_the_disk(tmp_path: Path) -> None:
    check_room(tmp_path, 0, todo="nothing")
    with pytest.raises(GsxError, match=r"(?s)not enough room on the disk.*GB free, found .* GB.*free some space"):
        check_room(tmp_path, 1 << 60, todo="free some space")


def test_what_the_system_says_in_words(tmp_path: Path) -> None:
    assert "found the disk is full" in disk_error(tmp_path, FULL).message
    assert "found [Errno 5] I/O" in disk_error(tmp_path, OSError(errno.EIO, "I/O")).message


@pytest.mark.parametrize(("value", "below"), [("/caches", "/caches"), ("", "~/.cache"), ("caches", "~/.cache")])
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, value: str, below: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == Path(below).expanduser() / "gsx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "gsx"
