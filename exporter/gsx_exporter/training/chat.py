"""Chats as the model reads them, by its own template; what it is to learn are the assistant's answers."""

from __future__ import annotations

from typing import Any

from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.errors import TextError
from gsx_exporter.training.learner import IGNORED

# A template that marks answers itself has this tag.
_MARKS = "{% generation", "{%- generation"


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """A chat's ids and labels: those of the assistant's answers, as the template writes them, with what ends them.

    Args: messages: with `role` and `content`, and what else the template reads.
    Raises:
        TextError: the template refuses the chat, or writes an answer in another way once more follows.
    """
    try:
        if any(mark in tokenizer.chat_template for mark in _MARKS):
            found = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = list(found["input_ids"])
            mask = found["assistant_masks"]
            return ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]
        ids, answers = _by_prefixes(tokenizer, messages)
    except TextError:
        raise
    except Exception as error:  # jinja's, tokenizers' and whatever a damaged message raises
        raise TextError(
            "a chat cannot be written by the model's template",
            expected="a list of messages with role and content",
            found=f"{one_line(error)}: {str(messages)[:80]}",
        ) from error
    labels = [IGNORED] * len(ids)
    for first, last in answers:
        labels[first:last] = ids[first:last]
    return ids, labels


def encode_prompt(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """A prompt with its answer: ids and labels; only the answer is learnt."""
    before = list(tokenizer(prompt or "").input_ids)
    after = list(tokenizer(answer or "", add_special_tokens=False).input_ids)
    return before + after, [IGNORED] * len(before) + after


def _by_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a chat, and where answers are: from what the chat is before an answer to what it is with it."""

    def ids_of(part: list[dict[str, Any]], *, asks: bool) -> list[int]:
        found = tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, add_generation_prompt=asks)
        return list(found["input_ids"])

    whole = ids_of(messages, asks=False)
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ids_of(messages[:number], asks=True)
        after = ids_of(messages[: number + 1], asks=False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise TextError(
                "the model's chat template does not write answers one behind the other: which tokens are an answer is "
                "not known",
                expected="the tag {% generation %} around answers, or a text that begins with the text so far",
                todo="mark the answers in the template, or give prompts and answers as columns",
            )
        answers.append((len(before), len(after)))
    return whole, answers
