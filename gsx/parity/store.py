"""Arrays that wait on disk until the other side of a comparison has run, so that both never take memory at once.

They are in one file without a name, which vanishes with the process however it ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from gsx_plugins.files import disk_error


@dataclass(frozen=True)
class Stored:
    """Rows [S, W] on disk. A slice of them, or `np.asarray`, reads them.

    Args:
        shape, dtype: of the array; start: its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    _file: IO[bytes] = field(repr=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(len(self))
        found = np.empty((max(0, last - first), *self.shape[1:]), self.dtype)
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        self._file.seek(self.start + first * row_bytes)
        view = found.data.cast("B") if found.size else memoryview(b"")
        while len(view):
            view = view[self._file.readinto(view) :]  # type: ignore[attr-defined]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


# Rows in memory or on disk.
Rows = np.ndarray | Stored


class Store:
    """A file for arrays, in a folder whose disk has room for them; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # until the block ends
        except OSError as error:
            raise self._no_room(error) from error

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def put(self, *blocks: np.ndarray) -> Stored:
        """Store an array [S, W]."""
        return self.put_blocks(blocks)

    def put_blocks(self, blocks: Iterable[np.ndarray]) -> Stored:
        """Store an array [S, W] that comes in blocks of rows."""
        try:
            start, rows, shape, dtype = self._file.seek(0, 2), 0, (0,), np.dtype(np.float32)
            for block in blocks:
                self._file.write(np.ascontiguousarray(block).data)
                rows, shape, dtype = rows + len(block), block.shape, block.dtype
            self._file.flush()
        except OSError as error:
            raise self._no_room(error) from error
        return Stored((rows, *shape[1:]), dtype, start, self._file)

    def _no_room(self, error: OSError) -> Exception:
        return disk_error(self._folder, error, todo="free some space there: comparing needs room for what is compared")
