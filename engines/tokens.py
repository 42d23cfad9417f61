"""Text and token ids of a bundle: its tokenizer, and text that streams out as ids come in."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engines.bundle.bundle import Bundle
from engines.errors import BundleError

TOKENIZER = "tokenizer.json"


class BundleTokenizer:
    """The tokenizer that a bundle carries.

    Raises:
        BundleError: the bundle has none (the checkpoint had none), or it cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
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
        """Ids of a text, begun as the model begins a text."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self._tokenizer)


class TextStream:
    """Ids in, text out, as soon as it is whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        return self._stream.step(self._tokenizer, token) or ""
