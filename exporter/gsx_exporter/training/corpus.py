"""Text to train, calibrate and measure on: files of a directory, or the running Python's standard library.

The part that a file belongs to depends only on its name, so the split does not change with the machine or with the
files around it. Tests of the standard library are only used for training: what is held out is library code.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gsx_exporter.errors import TextError

Part = Literal["train", "calibration", "heldout"]

SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
# One file in 20 is for calibration, and one is held out.
_SHARES = 20
# Tables and test data, which are neither prose nor handwritten code.
_STDLIB_LEFT_OUT = (
    "site-packages",
    "encodings",
    "lib2to3",
    "idlelib",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
    "__pycache__",
)
_STDLIB_TESTS = ("test", "tests")


@dataclass(frozen=True)
class Document:
    """One text file: its name relative to the corpus (with "/") and its contents."""

    name: str
    text: str


def read_corpus(directory: Path | None = None) -> list[Document]:
    """All documents, in the order of their names.

    Args:
        directory: of text files; None for the standard library of the running Python.
    Raises:
        TextError: there is no such directory, or no text in it.
    """
    if directory is None:
        return _read(Path(sysconfig.get_paths()["stdlib"]), (".py",), left_out=_STDLIB_LEFT_OUT)
    if not directory.is_dir():
        raise TextError(f"{directory}: no such directory", expected="a directory of text files")
    documents = _read(directory, SUFFIXES, left_out=())
    if not documents:
        raise TextError(
            f"{directory}: has no text files",
            expected="files that end in " + ", ".join(SUFFIXES),
            todo="rename the files, or give another directory",
        )
    return documents


def part_of(name: str) -> Part:
    """The part that a document belongs to."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _SHARES
    if share > 1 or set(name.split("/")[:-1]) & set(_STDLIB_TESTS):
        return "train"
    return "heldout" if share == 0 else "calibration"


def split(documents: Iterable[Document]) -> dict[Part, list[Document]]:
    """The documents of each part."""
    parts: dict[Part, list[Document]] = {"train": [], "calibration": [], "heldout": []}
    for document in documents:
        parts[part_of(document.name)].append(document)
    return parts


def _read(root: Path, suffixes: tuple[str, ...], *, left_out: tuple[str, ...]) -> list[Document]:
    documents = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in suffixes or set(relative.parts) & set(left_out) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # another encoding, or not readable: mostly test data of the codecs
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
    return documents
