"""Reading the settings of a run: from a recipe that ships or a YAML file, with changes; what is wrong is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gsx_exporter.training.settings import TrainSettings
from gsx_plugins.errors import UsageError

_RECIPES = "gsx_exporter.training.recipes"


def recipes() -> tuple[str, ...]:
    """The names of the recipes that ship."""
    files = resources.files(_RECIPES).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def recipe_source(recipe: str | Path) -> tuple[str, str]:
    """What messages call a recipe, and its YAML text. Args: recipe: the name of one that ships, or a file.

    Raises:
        UsageError: no such recipe or file.
    """
    if str(recipe) in recipes():
        file = resources.files(_RECIPES).joinpath(f"{recipe}.yaml")
        return f"recipe {recipe}", file.read_text(encoding="utf-8")
    try:
        return str(recipe), Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{recipe}: no such recipe or file",
            expected=f"a YAML file, or one of {', '.join(recipes())}",
            found=str(getattr(error, "strerror", None) or error),
        ) from error


def read_settings(recipe: str | Path, changes: Mapping[str, Any] | Sequence[str] = ()) -> TrainSettings:
    """Settings from a recipe's name or a YAML file, with some of them changed.

    Args:
        changes: dotted name -> value; or texts such as `gate.kind=scalar`, whose values are read as YAML.
    Raises:
        UsageError: no such recipe or file, not YAML, an unknown key, or a value that does not fit.
    """
    import yaml

    source, text = recipe_source(recipe)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: is not YAML", found=" ".join(str(error).split())) from error
    if not isinstance(raw, dict):
        raise UsageError(f"{source}: is no settings file", expected="names and values", found=type(raw).__name__)
    for name, value in (changes if isinstance(changes, Mapping) else _parsed(changes)).items():
        _put(raw, name, value)
    return settings_of(raw, source)


def settings_of(raw: Mapping[str, Any], source: str = "training settings") -> TrainSettings:
    """Settings from plain values.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    try:
        return TrainSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part in _plain_parts(raw, first["loc"])) or "settings"
        cause = first.get("ctx", {}).get("error")
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"{source}: {place} is not a setting",
                expected=f"one of {', '.join(_keys_beside(first['loc']))}",
            ) from None
        raise UsageError(
            f"{source}: {place} cannot be used",
            expected=str(cause) if isinstance(cause, ValueError) else first["msg"],
            found=repr(first["input"]) if place != "settings" and not isinstance(cause, ValueError) else None,
        ) from None


def _parsed(changes: Sequence[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise UsageError(f"{change!r} is not a setting", expected="NAME=VALUE, e.g. trainer.learning_rate=1e-4")
        try:
            found[name] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UsageError(f"{change!r}: its value is not YAML", found=" ".join(str(error).split())) from error
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text; nobody means one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(raw: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    place = raw
    for section in sections:
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{name} is not a setting", expected=f"{section} has no parts", found=repr(inner))
        place = inner
    place[last] = value


def _plain_parts(raw: Any, loc: Sequence[int | str]) -> set[int | str]:
    """The parts of an error's place that are keys of the file: pydantic adds the names of alternatives."""
    found: set[int | str] = set()
    for part in loc:
        if isinstance(raw, Mapping) and part in raw:
            raw = raw[part]
            found.add(part)
        elif isinstance(raw, list) and isinstance(part, int):
            found.add(part)
    return found


def _keys_beside(loc: Sequence[int | str]) -> list[str]:
    model: Any = TrainSettings
    for part in loc[:-1]:
        kinds = model.model_fields[part].annotation
        model = next(
            (
                kind
                for kind in (kinds, *getattr(kinds, "__args__", ()))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            model,
        )
    return list(model.model_fields)
