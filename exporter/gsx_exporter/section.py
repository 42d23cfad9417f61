"""Reading the `gsx` section of `config.json`: each check names the key, what was expected and what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gsx_exporter.errors import CheckpointError


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not among those allowed."""
    if value not in allowed:
        raise CheckpointError(
            f"config.json: {name} has an unknown value", expected="one of " + ", ".join(allowed), found=repr(value)
        )


def known_keys(name: str, section: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Refuse what is no section, and keys that are not known."""
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {name} is not a section", expected="an object", found=repr(section))
    for key in section:
        if key not in allowed:
            raise CheckpointError(
                f"config.json: section {name!r} has an unknown key",
                expected="only " + ", ".join(allowed),
                found=repr(key),
            )


def whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(
            f"config.json: {name} is not a count", expected=f"a whole number from {least}", found=repr(value)
        )


def flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} is no yes or no", expected="true or false", found=repr(value))


def finite(name: str, value: object) -> None:
    """Refuse what is not a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"config.json: {name} is not a number", expected="a finite number", found=repr(value))
