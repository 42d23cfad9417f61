"""C++ gives what Python gives on the same inputs: tokens, counters, and every byte that an engine is fed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gsx_engines.bundle.schema import SCHEMA_FILE, manifest_schema
from tests.vectors import make

NAMES = list(make.FILES)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_what_python_makes(name: str) -> None:
    """If this fails after a deliberate change: run `python -m tests.vectors.make`, and check what changed."""
    assert (make.FOLDER / f"{name}.json").read_text(encoding="utf-8") == make.text_of(name)


def test_schema_is_what_python_checks() -> None:
    """If this fails after a deliberate change: run `python -m gsx_engines.bundle.schema`."""
    assert SCHEMA_FILE.read_text(encoding="utf-8") == manifest_schema()


@pytest.mark.parametrize("name", NAMES)
def test_cpp_repeats_them(cpp_build: Path, name: str) -> None:
    path = make.FOLDER / f"{name}.json"
    done = subprocess.run(
        [cpp_build / "tests/gsx_vectors", path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    assert "0 different" in done.stdout


def test_a_difference_is_found(cpp_build: Path, tmp_path: Path) -> None:
    """The comparison itself finds one token that Python did not generate."""
    text = (make.FOLDER / "sampling.json").read_text(encoding="utf-8")
    changed = tmp_path / "sampling.json"
    changed.write_text(text.replace('"picks": [[0, 0, 0]', '"picks": [[0, 0, 1]', 1), encoding="utf-8")
    done = subprocess.run(
        [cpp_build / "tests/gsx_vectors", changed], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "1 different" in done.stdout
