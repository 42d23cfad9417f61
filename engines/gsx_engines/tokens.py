"""Text and token ids of a bundle: its tokenizer, and decoding text as ids come in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.errors import BundleError
from gsx_plugins.errors import UsageError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are not (yet) a character
_BYTE = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")  # a token of a ByteFallback decoder that stands for one byte
# Tokens that a piece of text is decoded behind. A character has at most four bytes, so no more of them can matter.
_CONTEXT_TOKENS = 4
# With so many tokens behind the context it begins anew: longer makes every step slower, shorter means more steps.
_WINDOW_TOKENS = 4


class BundleTokenizer:
    """The tokenizer of a bundle.

    Raises:
        BundleError: the bundle has no tokenizer (since the checkpoint had none), or it cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._begin = bundle.manifest.decoder.bos_id
        path = bundle.directory / TOKENIZER
        if not path.is_file():
            raise BundleError(
                f"bundle {bundle.directory}: has no tokenizer",
                expected=TOKENIZER,
                todo="put the model's tokenizer.json into the bundle, or give token ids in place of text",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception on malformed files
            raise BundleError(f"{path}: cannot be read as a tokenizer", found=str(error)) from error
        # Older bundles have a copy of the checkpoint's file, which may hold what somebody once did with a text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = _splits_special_tokens(bundle)
        self._decoding = Decoding(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that the model expects at its beginning.

        Raises:
            UsageError: the tokenizer has no ids for it, not even for unknown words.
        """
        try:
            return list(self._tokenizer.encode(text).ids)
        except Exception as error:  # the library raises a bare Exception
            raise UsageError("the tokenizer cannot read this text", found=str(error)) from error

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text that names its special tokens itself, as a chat template writes it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that are never split: special ones, and others with a meaning of their own."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def token_text(self, number: int) -> str:
        """The text of one token by itself; special tokens by their names."""
        return str(self._tokenizer.decode([number], skip_special_tokens=False))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt. A model with a beginning-of-text token can continue even the empty text.

        Raises:
            UsageError: there is nothing to continue.
        """
        ids = self.encode(text)
        if ids:
            return ids
        if self._begin is None:
            raise UsageError(
                "the prompt is empty", expected="some text, since this model has no beginning-of-text token"
            )
        return [self._begin]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt_ids: Sequence[int] = ()) -> TextStream:
        """A decoder for ids that arrive one by one behind a prompt."""
        return TextStream(self._decoding, prompt_ids)


def _splits_special_tokens(bundle: Bundle) -> bool:
    """Whether a special token's name in a text is ordinary text; `tokenizer.json` has no place for this setting."""
    path = bundle.directory / TOKENIZER_CONFIG
    if not path.is_file():
        return False
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: is not readable JSON", found=str(error)) from error
    return isinstance(settings, dict) and settings.get("split_special_tokens") is True


class Decoding:
    """How a tokenizer decodes: what of a text can still change when more tokens come.

    A decoder is a chain of steps. Those before `Fuse` or `ByteLevel` see tokens, the later ones the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        steps = _steps(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else None)
        kinds = [step["type"] for step in steps]
        fused = next((place for place, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
        # Only ByteFallback looks at tokens together before they are fused: a run of bytes is text, or as many U+FFFD.
        self._has_byte_runs = "ByteFallback" in kinds
        late = [_late_step(step) for step in steps[fused + 1 :]]
        self.patterns = [pattern for found in late if found for pattern in found]
        early = all(kind in _EARLY_STEPS for kind in kinds[:fused])
        # Whether the text of a token depends on a few tokens before it only.
        self.is_local = early and all(found is not None for found in late) and not self.patterns
        # Whether no more than the beginning of a pattern at the end of the text can still change.
        self.is_certain = self.is_local or (early and None not in late and set(self.patterns) <= _CLEANED)
        self.context = max([_CONTEXT_TOKENS, *(step.get("start", 0) for step in steps)])
        self.window = _WINDOW_TOKENS

    def token(self, number: int) -> str | None:
        """The token of an id, if it is part of the text: decoders never see special and unknown ones."""
        try:
            token = self._tokenizer.id_to_token(number)
        except OverflowError:  # negative
            return None
        return None if token is None or token in self._special else token

    def is_byte(self, token: str) -> bool:
        """Whether a token is part of a run of bytes, of which nothing is certain before its end."""
        return self._has_byte_runs and _BYTE.fullmatch(token) is not None

    def text(self, ids: Sequence[int]) -> str:
        """Text of ids that are part of the text; empty where the library's decoder fails."""
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        except BaseException as error:
            # The library raises a bare Exception, and on an error of its own a PanicException, which has no public name
            # and is no Exception. A request must not end for it.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return ""

    def unsure(self, text: str) -> int:
        """Number of characters at the end that may change."""
        if text.endswith(_REPLACEMENT):
            return 1  # of unfinished bytes, only the last U+FFFD can become something else
        return _beginning(text, self.patterns) if self.patterns else 0


def _beginning(text: str, wholes: Sequence[str]) -> int:
    """Length of the longest suffix of a text that is the beginning of one of these."""
    return max((n for whole in wholes for n in range(1, len(whole)) if text.endswith(whole[:n])), default=0)


_EARLY_STEPS = ("ByteFallback", "Replace", "Strip", "Metaspace", "WordPiece")
# What transformers removes the space of, where a tokenizer asks for it; no replaced text can begin another of them.
_CLEANED = {" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"}


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _late_step(step: dict[str, Any]) -> list[str] | None:
    """The texts of several characters that a step replaces in the whole text; None if it may change anything."""
    kind = step["type"]
    if kind in ("Fuse", "ByteFallback") or (kind == "Strip" and not step["stop"]):
        return []
    pattern = step["pattern"].get("String") if kind == "Replace" else None
    if not pattern or _REPLACEMENT in pattern:
        return None
    return [pattern] if len(pattern) > 1 else []


class TextStream:
    """Turns ids into text as soon as it is certain.

    All pieces and the rest together are what decoding the prompt and all ids together gives behind the prompt's own
    text. A piece is decoded behind a few tokens before it, since some decoders drop a space at the beginning of a text.
    """

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int]) -> None:
        self._decoding = decoding
        # The last ids that are part of the text, and their tokens.
        self._window: list[int] = []
        self._tokens: list[str] = []
        for number in reversed(prompt_ids):
            if decoding.is_local and self._begins_well():
                break
            self._take(number)
        self._window.reverse()
        self._tokens.reverse()
        self._given = len(decoding.text(self._window))  # so many characters of the window's text are not to be given

    def push(self, token: int) -> str:
        """The text that becomes certain with this token; empty while a character is unfinished."""
        decoding = self._decoding
        if not self._take(token) or decoding.is_byte(self._tokens[-1]) or not decoding.is_certain:
            return ""
        text = decoding.text(self._window)
        unsure = decoding.unsure(text)
        piece = self._give(text, len(text) - unsure)
        if text and decoding.is_local and len(self._window) > decoding.context + decoding.window:
            self._begin_anew(len(text) - unsure, unsure)
        return piece

    def finish(self) -> str:
        """The rest of the text."""
        text = self._decoding.text(self._window)
        return self._give(text, len(text))

    def _take(self, number: int) -> bool:
        """Put an id into the window, if it is part of the text."""
        token = self._decoding.token(number)
        if token is None:
            return False
        self._window.append(number)
        self._tokens.append(token)
        return True

    def _begins_well(self) -> bool:
        """Whether the window, filled from its end, has enough context, and no run of bytes that begins before it."""
        if sum(map(bool, self._tokens)) < self._decoding.context or self._decoding.is_byte(self._tokens[-1]):
            return False
        return self._decoding.text(self._window[::-1]) != ""

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _begin_anew(self, certain: int, unsure: int) -> None:
        """Leave only a context in the window, whose text has so many certain and unsure characters."""
        full = [place for place, token in enumerate(self._tokens) if token][-self._decoding.context :]
        length = len(self._decoding.text(self._window[full[0] :])) if full else 0
        if length:
            ahead = self._given - certain  # above 0 where new bytes made the prompt's text shorter
            self._window, self._tokens = self._window[full[0] :], self._tokens[full[0] :]
            self._given = length - unsure + ahead


class TextWriter:
    """Passes text on piece by piece, and holds back what may be the beginning of a stop text."""

    def __init__(self, stream: TextStream, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._stream, self._stops, self._on_text = stream, stops, on_text
        self._written: list[str] = []
        self._held = ""
        self._stopped = False

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop text is complete."""
        return self._add(self._stream.push(token))

    def finish(self) -> str:
        """Emit what was held back, up to a stop text; returns the whole text."""
        if not self._stopped and not self._add(self._stream.finish()):
            self._emit(len(self._held))
        return "".join(self._written)

    def _add(self, text: str) -> bool:
        """Add text; returns whether a stop text is complete."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self._emit(min(places))
            self._stopped = True
            return True
        self._emit(len(self._held) - _beginning(self._held, self._stops))
        return False

    def _emit(self, count: int) -> None:
        if count:
            piece, self._held = self._held[:count], self._held[count:]
            self._written.append(piece)
            self._on_text(piece)


def check_text(text: str) -> None:
    """Refuse a text that is not valid UTF-8 (from bytes of another encoding on the command line)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "the prompt or a stop text is not UTF-8 text", found=f"an invalid byte at {error.start}"
        ) from error
