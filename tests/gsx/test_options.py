"""Groups of options: a command takes one value, and the command line sees its fields. Durations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from gsx.cli.options import KeepOptions, grouped, seconds_of
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.serving.fields import INPUTS
from gsx_engines.serving.openai_requests import GsxOptions


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


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-1m", "10 minutes", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a duration such as 90s"):
        seconds_of(text)


@pytest.mark.parametrize("setting", [field.name for field in fields(KeepSettings)])
def test_a_keep_setting_can_be_given_in_every_way(setting: str) -> None:
    option = "exit_layer" if setting == "exit" else setting
    given: dict[str, Any] = {option: 3}
    assert KeepOptions(**given).settings() == KeepSettings(**{setting: given[option]})
    assert setting in GsxOptions.model_fields
    assert setting in {field.name for field in INPUTS}
