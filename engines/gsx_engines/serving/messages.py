"""Messages of a chat in the form of the OpenAI API: checks them, and makes a prompt by the bundle's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gsx_engines.chat import ChatTemplate
from gsx_engines.serving.limits import check_ids_fit, check_text_size
from gsx_engines.tokens import check_text
from gsx_plugins.errors import UsageError


class TextPart(BaseModel):
    """A part of a message's content; only texts are taken."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat; further keys are passed on to the template."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message for a template, its content as one text."""
        values: dict[str, Any] = self.model_dump()
        if isinstance(self.content, list):
            values["content"] = "".join(part.text for part in self.content)
        check_text(f"{self.role}{values['content'] or ''}")
        return values


_MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1)])


def messages_of(text: str) -> list[Message]:
    """Messages from JSON.

    Raises:
        UsageError: it is not a list of messages.
    """
    try:
        return _MESSAGES.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            "messages are not a chat",
            expected='JSON: [{"role": "user", "content": "..."}, ...]',
            found=f"{place}: {first['msg']}" if place else first["msg"],
        ) from error


def chat_prompt(template: ChatTemplate | None, messages: Sequence[Message], context: int, instead: str) -> list[int]:
    """Ids of a chat, up to where the answer begins.

    Args:
        template: of the bundle; None if it has none.
        messages: the chat.
        context: how many tokens a request may have, prompt and new ones.
        instead: what to send to a model without a template, for the error's message.
    Raises:
        UsageError: there is no template, it refuses the messages, or they are too long.
    """
    if template is None:
        raise UsageError(
            "this model has no chat template",
            expected=instead,
            found="messages",
            todo="serve a model that was trained for chats, or send a prompt",
        )
    given = [message.for_template() for message in messages]
    check_text_size("the chat", sum(len(str(one["content"] or "").encode()) for one in given), context)
    prompt = template.prompt(given)
    check_ids_fit(len(prompt), context)
    return prompt
