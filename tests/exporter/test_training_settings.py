"""Training settings: recipes and examples can be read, changes are placed, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gsx_exporter.training.reading import read_settings, recipe_source, recipes, settings_of
from gsx_exporter.training.settings import ExitSettings, TrainSettings
from gsx_plugins.errors import UsageError

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_recipe_is_read_and_written_again(tmp_path: Path) -> None:
    assert recipes() == ("gateskip", "gateskip+layerskip", "layerskip", "sorted")
    for name in recipes():
        found = read_settings(name, {"model": "my-model"})
        assert (found.gate is not None) is ("gateskip" in name)
        path = tmp_path / "mine.yaml"
        path.write_text(found.to_yaml())
        assert read_settings(path) == found
        assert recipe_source(name)[1].startswith("#")


def test_examples_are_read() -> None:
    first = read_settings(EXAMPLES / "train_example.yaml")
    assert first.new is not None
    assert first.new.num_layers == 16
    assert read_settings(EXAMPLES / "train_exits.yaml", ["model=first"]).model == "first"


def test_changes() -> None:
    changes = [
        "model=org/name",
        "gate.kind=scalar",
        "trainer.learning_rate=1e-4",
        "trainer.bf16=true",
        "exits.depths=[1,2]",
    ]
    found = read_settings("gateskip", changes)
    assert found.gate is not None
    assert (found.model, found.gate.kind, found.trainer["learning_rate"]) == ("org/name", "scalar", 1e-4)
    assert found.trainer["bf16"] is True
    assert found.exits == ExitSettings(depths=(1, 2))
    assert found.gate.sparsity == 0.1


BASE: dict[str, Any] = {"model": "m", "gate": {}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gates": {}}, r"gates is not a setting\n.*one of model, new"),
    ({"gate": {"knd": "scalar"}}, r"gate\.knd is not a setting\n.*kind, input"),
    ({"gate": {"kind": "matrix"}}, r"gate\.kind cannot be used\n.*'vector' or 'scalar', found 'matrix'"),
    ({"gate": {"std": "0.1"}}, r"gate\.std cannot be used\n.*number.*found '0\.1'"),
    ({"gate": {"budget_end": 1.5}}, r"gate\.budget_end cannot be used\n.*less than or equal to 1"),
    ({"lora": {"rank": 0}}, r"lora\.rank cannot be used\n.*greater than or equal to 1, found 0"),
    ({"lora": {"rank_pattern": {"(": 2}}}, r"lora\.rank_pattern cannot be used\n.*regular expression"),
    ({"exits": {}}, r"exits cannot be used\n.*one of depths and every"),
    ({"exits": {"depths": [0]}}, r"exits\.depths\.0 cannot be used"),
    ({"gate": None}, r"settings cannot be used\n.*gate, exits or both"),
    ({"model": None}, r"one of model and new"),
    ({"mode": "frozen", "exits": {"every": 2}}, "gates alone with mode frozen"),
    ({"muon": {}}, "mode full with new or muon"),
    ({"model": None, "mode": "full", "new": {}, "distill": {}}, "nothing to teach"),
    ({"model": None, "mode": "full", "new": {"num_heads": 3}}, "num_kv_heads divides num_heads"),
    ({"data": {"held_out": 1.5}}, r"data\.held_out cannot be used"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of({**BASE, **change})


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(UsageError, match=r"no such recipe or file\n.*gateskip, gateskip\+layerskip"):
        read_settings(path)
    for text, message in (("- a\n", "is no settings file"), ("a: [1\n", "is not YAML")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_settings(path)
    with pytest.raises(UsageError, match="'gate' is not a setting"):
        read_settings("gateskip", ["gate"])
    with pytest.raises(UsageError, match=r"lora\.rank\.x is not a setting\n.*rank has no parts"):
        read_settings("gateskip", ["lora.rank=4", "lora.rank.x=4"])


def test_depths_of_a_model() -> None:
    assert ExitSettings(every=4).of(12) == (4, 8)
    assert ExitSettings(depths=(3, 1)).of(12) == (1, 3)
    for exits, layers in (
        (ExitSettings(depths=(12,)), 12),
        (ExitSettings(every=12), 12),
        (ExitSettings(depths=(2, 2)), 9),
    ):
        with pytest.raises(UsageError, match="exits are outside the model, or named twice"):
            exits.of(layers)


def test_the_type_is_public() -> None:
    import gsx

    assert gsx.TrainSettings is TrainSettings
