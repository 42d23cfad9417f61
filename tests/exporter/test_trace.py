"""Equal parts are traced once in a process, and what one export does to a part changes no other export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gsx_exporter.graph import trace as tracing
from gsx_exporter.graph.trace import Input, Part, trace

FLOATS = Input((3, 4), torch.float32, (0,))


class Shift(nn.Module):
    """Multiplies by a weight, adds a constant, and applies a function."""

    def __init__(self, width: int = 4, shift: float = 1.0, function: Callable[[Any], Any] = torch.sin) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"))
        self.shift, self.function = shift, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x * self.weight + torch.full((4,), self.shift))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The programs that PyTorch is asked for, of a process that has traced nothing yet."""
    asked: list[nn.Module] = []
    export = torch.export.export

    def counted(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        asked.append(module)
        return export(module, *arguments, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    tracing.translated.cache_clear()
    return asked


def traced(module: nn.Module, example: Input = FLOATS, name: str = "y") -> Part:
    return trace(module, {"x": example}, [name])


def nodes(part: Part) -> list[str]:
    return [str(node) for node in part.graph.nodes] + [str(value) for value in part.graph.constants.values()]


def test_an_equal_part_is_traced_once(traces: list[nn.Module]) -> None:
    first, second = traced(Shift()), traced(Shift())
    assert len(traces) == 1
    assert nodes(first) == nodes(second)


def test_what_is_done_to_a_part_stays_there(traces: list[nn.Module]) -> None:
    first = traced(Shift())
    before = nodes(first)
    first.graph.rename({"x": "hidden", "y": "layers.0.output"})
    del first.graph.nodes[0].input[:]
    assert nodes(traced(Shift())) == before
    assert traced(Shift(), name="z").outputs == ["z"]
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("other", "example"),
    [
        (Shift(width=1), FLOATS),
        (Shift(shift=1.5), FLOATS),
        (Shift(function=torch.cos), FLOATS),
        (Shift().double(), FLOATS),
        (Shift(), Input((3, 4), torch.float32)),
        (Shift(), Input((3, 4), torch.float64, (0,))),
    ],
    ids=["shape of a weight", "constant", "function", "type of a weight", "fixed axis", "type of an input"],
)
def test_another_part_is_traced_anew(traces: list[nn.Module], other: nn.Module, example: Input) -> None:
    first, second = traced(Shift()), traced(other, example)
    assert len(traces) == 2
    assert str(first.graph.proto) + str(nodes(first)) != str(second.graph.proto) + str(nodes(second))


def test_functions_without_a_name_are_not_taken_for_each_other(traces: list[nn.Module]) -> None:
    parts = [traced(Shift(function=lambda x, n=n: x * n)) for n in (2, 3)]
    assert len(traces) == 2
    assert nodes(parts[0]) != nodes(parts[1])
