"""Reading the text after a policy's colon, `word,name=value,...`, into a pydantic model: one parser for all rules."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gsx_plugins.errors import UsageError

P = TypeVar("P", bound="Parameters")


class Parameters(BaseModel):
    """The parameters of a rule. A subclass declares a field for each, with its type, default and limits.

    A parameter is given at most once, as `name=value`; the one that `leading_word` names may come first without its
    name. The field's type converts values from text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def leading_word(cls) -> str | None:
        """The field that may be given first, as a word without its name; None if there is no such field."""
        return None


def read_parameters(policy: str, model: type[P], text: str, expected: str, todo: str | None = None) -> P:
    """Read a policy's parameters.

    Args:
        policy: its name.
        model: the parameters.
        text: what follows the colon.
        expected, todo: the form of the text and an example, for the error.
    Raises:
        UsageError: an unknown name, a name given twice, or a value that does not fit; the error shows that part.
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
    """Refuse the text after the colon.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"--policy {policy}: its parameters", expected=expected, found=repr(found), todo=todo) from None
