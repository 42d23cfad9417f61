"""Chats: the bundle's own chat template turns messages into a prompt, as transformers renders it.

A template is a Jinja2 program that comes with a model, so it runs in a sandbox: it sees the messages and nothing else.
The names and filters that it may use are those of transformers' `apply_chat_template`, without transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.errors import BundleError
from gsx_engines.tokens import TOKENIZER_CONFIG, BundleTokenizer
from gsx_plugins.errors import UsageError

TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = "special_tokens_map.json"
# Of several named templates, the one for chats without tools.
_DEFAULT_NAME = "default"
# An answer that no template writes by itself, to find what it writes behind answers.
_ANSWER = "gsx-answer"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class TemplateText:
    """A chat template, and the file that has it."""

    file: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def template_in(directory: Path) -> TemplateText | None:
    """The chat template of a model's or bundle's directory; a file of its own comes before an entry in another, as in
    transformers. None without one.

    Raises:
        BundleError: the file with it cannot be read.
    """
    path = directory / TEMPLATE_FILE
    if path.is_file():
        try:
            return TemplateText(TEMPLATE_FILE, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: cannot be read", expected="UTF-8 text", found=str(error)) from error
    found = _object(directory / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {one["name"]: one.get("template") for one in found if isinstance(one, dict) and "name" in one}
        found = named.get(_DEFAULT_NAME)
    return TemplateText(TOKENIZER_CONFIG, found) if isinstance(found, str) and found else None


class ChatTemplate:
    """The chat template of a bundle.

    Args:
        bundle: the bundle.
        tokenizer: its tokenizer.
    Raises:
        UsageError: the bundle has no template.
        BundleError: the template is not the exported one, or no valid Jinja2.
    """

    def __init__(self, bundle: Bundle, tokenizer: BundleTokenizer) -> None:
        found = template_in(bundle.directory)
        entry = bundle.manifest.chat_template
        if entry is not None and (found is None or found.sha256 != entry.sha256):
            raise BundleError(
                f"bundle {bundle.directory}: its chat template does not match gsx.json",
                expected=f"sha256 {entry.sha256} in {entry.file}",
                found="none" if found is None else f"{found.sha256} in {found.file}",
                todo="the file changed after export: restore it, or run `gsx export` again",
            )
        if found is None:
            raise UsageError(
                f"bundle {bundle.directory}: has no chat template",
                expected=f"{TEMPLATE_FILE}, or chat_template in {TOKENIZER_CONFIG}",
                todo="export a model that was trained for chats, or continue a text in place of a chat",
            )
        try:
            self._template = _environment().from_string(found.text)
        except jinja2.TemplateError as error:
            raise BundleError(
                f"{bundle.directory / found.file}: the chat template is not valid Jinja2", found=str(error)
            ) from error
        self._names = _special_tokens(bundle.directory)
        self._tokenizer = tokenizer
        self.stop_ids = self._stop_ids(bundle.manifest.decoder.eos_ids)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the next answer begins.

        Args: messages: each with `role` and `content`; other keys are passed on to the template.
        Raises:
            UsageError: the template refuses the messages.
        """
        return self._tokenizer.encode_rendered(self.render(messages))

    def render(self, messages: Sequence[Message], *, answer_begins: bool = True) -> str:
        """The text of a chat.

        Args:
            messages: as in `prompt`.
            answer_begins: whether what comes before an answer is at its end.
        """
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=answer_begins, **self._names
            )
        except Exception as error:  # a template is a program, and may fail in any way
            text = str(error) or type(error).__name__
            raise UsageError(
                "the model's chat template refuses these messages",
                found=text,
                todo="roles often have to alternate: user, assistant, user; some models take no system message",
            ) from error

    def _stop_ids(self, ends: Sequence[int]) -> frozenset[int]:
        """The tokens that end an answer: those that end a text, and the one that the template writes behind answers."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            rendered = self.render(chat, answer_begins=False)
        except UsageError:
            return frozenset(ends)
        behind = self._tokenizer.encode_rendered(rendered.rpartition(_ANSWER)[2])
        turn_ends = {behind[0]} & self._tokenizer.added_ids if behind else set()
        return frozenset(ends) | turn_ends


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 with what transformers gives to a template (`_cached_compile_jinja_template`)."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    return found


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        """See Jinja2."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Dict:
    """The type `dict` as far as templates need it: a type itself has attributes that reach into Python."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of `dict`."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which could reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in Jinja2, so that a template may have a name `self`.
        self, args = args[0], args[1:]
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no names such as {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _special_tokens(directory: Path) -> dict[str, str]:
    """The texts of `bos_token` and the like, as the tokenizer's files name them."""
    found: dict[str, str] = {}
    for name in (_SPECIAL_TOKENS, TOKENIZER_CONFIG):
        for key, value in _object(directory / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: is not readable JSON", found=str(error)) from error
    return found if isinstance(found, dict) else {}
