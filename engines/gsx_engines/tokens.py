"""Text and token ids of a bundle: its tokenizer, and decoding text as ids come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.errors import BundleError
from gsx_plugins.errors import UsageError

TOKENIZER = "tokenizer.json"


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

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that the model expects at its beginning."""
        return list(self._tokenizer.encode(text).ids)

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

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return TextStream(self._tokenizer)


class TextStream:
    """Turns ids into text as soon as they complete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        return self._stream.step(self._tokenizer, token) or ""


class TextWriter:
    """Passes text on piece by piece, and holds back what may be the beginning of a stop text."""

    def __init__(self, stream: TextStream, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._stream, self._stops, self._on_text = stream, stops, on_text
        self._written: list[str] = []
        self._held = ""
        self._stopped = False

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop text is complete."""
        self._held += self._stream.push(token)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self._emit(min(places))
            self._stopped = True
            return True
        self._emit(len(self._held) - self._possible_stop())
        return False

    def finish(self) -> str:
        """Emit what was held back; returns the whole text."""
        if not self._stopped:
            self._emit(len(self._held))
        return "".join(self._written)

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text that is the beginning of a stop text."""
        lengths = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)

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
