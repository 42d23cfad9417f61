"""Groups of options: a command takes one value, and the command line sees its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from gsx.cli.options import grouped


@dataclass(frozen=True)
class Paint:
    """How it looks."""

    colour: Annotated[str, typer.Option(help="Its colour.")] = "red"
    coats: Annotated[int, typer.Option("--layers", help="How thick.")] = 1


def app(seen: list[object]) -> typer.Typer:
    def paint(thing: Annotated[str, typer.Argument()], look: Paint, dry: bool = False) -> None:
        """Paint a thing."""
        seen.append((thing, look, dry))

    made = typer.Typer()
    made.command()(grouped(paint))
    return made


def test_fields_are_options_under_their_own_heading() -> None:
    seen: list[object] = []
    assert CliRunner().invoke(app(seen), ["wall"]).exit_code == 0
    assert CliRunner().invoke(app(seen), ["wall", "--colour", "blue", "--layers", "3", "--dry"]).exit_code == 0
    assert seen == [("wall", Paint(), False), ("wall", Paint("blue", 3), True)]
    shown = CliRunner().invoke(app(seen), ["--help"]).output
    assert shown.index("How it looks") < shown.index("--colour") < shown.index("--layers")
    assert "Paint a thing." in shown


def test_a_wrong_value_names_the_option() -> None:
    found = CliRunner().invoke(app([]), ["wall", "--layers", "many"])
    assert found.exit_code == 2
    assert "--layers" in found.output
