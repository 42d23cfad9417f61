"""The cache of translated programs: it gives the same graph, and never that of another program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gsx_exporter.graph import assemble, translation
from gsx_exporter.graph import trace as tracing
from gsx_exporter.graph.trace import Input, Part, trace

assert assemble, "imports the ops that programs are made of"
FLOATS = Input((3, 4), torch.float32, (0,))


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    """Nothing is remembered from an earlier test, so that the cache is asked."""
    tracing.translated.cache_clear()


class Shift(nn.Module):
    """Adds a constant tensor, and multiplies by a number that is written into the program."""

    def __init__(self, shift: float, factor: float) -> None:
        super().__init__()
        self.shift, self.factor = torch.full((4,), shift), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.shift) * self.factor


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Part]]:
    """The file of one program, and its part."""
    tracing.translated.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home := tmp_path_factory.mktemp("cache")))
        part = traced()
        (file,) = (home / "gsx" / "translations").iterdir()
        yield file, part


class TranslatedError(Exception):
    """PyTorch was asked to translate."""


@pytest.fixture
def translating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when PyTorch is asked to translate."""

    def export(*_: Any, **__: Any) -> None:
        raise TranslatedError

    monkeypatch.setattr(torch.onnx, "export", export)


def traced(shift: float = 1.0, factor: float = 2.0, example: Input = FLOATS) -> Part:
    return trace(Shift(shift, factor), {"x": example}, ["y"])


def nodes(part: Part) -> list[str]:
    return [str(node) for node in part.graph.nodes] + [str(value) for value in part.graph.constants.values()]


@pytest.mark.usefixtures("translating")
def test_the_second_time_nothing_is_translated(first: tuple[Path, Part]) -> None:
    assert nodes(traced()) == nodes(first[1])


OTHER: dict[str, dict[str, Any]] = {
    "a constant": {"shift": 1.5},
    "a number": {"factor": 3.0},
    "a type": {"example": Input((3, 4), torch.float64, (0,))},
    "a fixed axis": {"example": Input((3, 4), torch.float32)},
}


@pytest.mark.usefixtures("first", "translating")
@pytest.mark.parametrize("other", OTHER)
def test_another_program_is_translated(other: str) -> None:
    with pytest.raises(TranslatedError):
        traced(**OTHER[other])


@pytest.mark.usefixtures("first", "translating")
def test_another_version_translates_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "version", lambda name: f"{name} of tomorrow")
    with pytest.raises(TranslatedError):
        traced()


def test_a_damaged_file_is_replaced(first: tuple[Path, Part]) -> None:
    file, part = first
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert nodes(traced()) == nodes(part)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("where a folder belongs")
    assert nodes(traced())
