"""The command line in this process, so that torch is imported once, and copies of exports, to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gsx.cli import run
from tests.gsx.command_line import Gsx, Outcome


@pytest.fixture
def gsx(capsys: pytest.CaptureFixture[str]) -> Gsx:
    """Run a command, which must never end in a traceback."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path: Path, tiny_gated: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_gated, tmp_path / "model"))


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A copy of the tiny bundle, to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
