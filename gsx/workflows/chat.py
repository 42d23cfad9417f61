"""`gsx generate --chat`: a bundle answers, message by message, with its own chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gsx.workflows.generate import GenerateResult, Generator
from gsx_engines.chat import ChatTemplate
from gsx_engines.tokens import check_text


class Chat:
    """A chat with a bundle, and its history.

    Args:
        source: the bundle, with the settings of all answers.
        max_new_tokens: of each answer.
        stop: texts that end an answer.
    Raises:
        GsxError: the bundle has no chat template, or it cannot be used.
    """

    def __init__(self, source: Generator, max_new_tokens: int, stop: Sequence[str] = ()) -> None:
        assert source.tokenizer is not None
        self.messages: list[dict[str, Any]] = []
        self._source, self._most, self._stop = source, max_new_tokens, stop
        self._template = ChatTemplate(source.bundle, source.tokenizer)

    def answer(self, message: str, on_text: Callable[[str], None]) -> GenerateResult:
        """The answer to a user's message; on_text is called with each piece of it.

        An answer that is interrupted stays in the history as far as it got. A message that is refused does not.
        """
        check_text(message)
        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = self._template.prompt(asked)
        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            on_text(text)

        try:
            return self._source.generate(prompt, self._most, self._stop, write, self._template.stop_ids)
        finally:
            if pieces:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
