"""A copy of an export, to damage or to build engines in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A copy of the tiny bundle."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
