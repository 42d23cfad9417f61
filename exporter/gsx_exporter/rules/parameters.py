"""The text behind a policy's colon, `word,name=value,...`, read into a pydantic model: one parser for all rules."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gsx_plugins.errors import UsageError

P = TypeVar("P", bound="Parameters")


class Parameters(BaseModel):
    """What a rule is given. A subclass declares a field for each name, with its type, default and limits.

    A field is given once, as `name=value`; the one that `leading_word` names may come first without its name. Values
    are converted from text by the field's type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def leading_word(cls) -> str | None:
        """The field that may be given first, as a bare word; None for no such field."""
        return None


def read_parameters(policy: str, model: type[P], text: str, expected: str, todo: str | None = None) -> P:
    """Read a policy's parameters.

    Args:
        policy: its name. text: behind its colon. expected: the form of the text, for the error; todo: an example.
    Raises:
        UsageError: an unknown name, one that is given twice, a value that does not fit; it names that part.
    """
    values: dict[str, Any] = {}
    parts = [part.strip() for part in text.split(",")] if text else []
    for number, part in enumerate(parts):
        name, equals, value = part.partition("=")
        if not equals and number == 0 and (leading := model.leading_word()) is not None:
            name, value = leading, part
        elif not equals:
            bad_parameters(policy, expected, part, todo)
        if name not in model.model_fields or name in values:
            bad_parameters(policy, expected, part, todo)
        values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"][0] if first["loc"] else None
        found = f"{place}={values[place]}" if place in values else text
        cause = first.get("ctx", {}).get("error")
        bad_parameters(policy, str(cause) if isinstance(cause, ValueError) else expected, found, todo)


def bad_parameters(policy: str, expected: str, found: str, todo: str | None = None) -> NoReturn:
    """Refuse what is behind the colon."""
    raise UsageError(f"--policy {policy}: its parameters", expected=expected, found=repr(found), todo=todo) from None
