"""Text -> windows of token ids, for calibration and evaluation.

The default calibration text is part of the package, so that an export needs only a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsx_exporter.errors import CheckpointError, TextError

if TYPE_CHECKING:
    from gsx_exporter.checkpoint.checkpoint import Checkpoint

WINDOW_TOKENS = 512
# With fewer tokens than this, a quantile at a share of 0.01 is meaningless.
MIN_TOKENS = 256
# No ordinary text has this share of one token: it would be blanks, or words that the tokenizer does not know.
MOST_OF_ONE = 0.75
# Bytes of text per token, below which the tokenizer was not made for the language: SmolLM2's has 4 to 5 for English
# prose and code, 2.7 for German, 2.1 for Finnish, 1.7 for Chinese (measured).
LEAST_BYTES = 2.5
# Tokenizers with fewer tokens have short ones for every text.
_SMALL_VOCABULARY = 1000


@dataclass(frozen=True)
class TokenText:
    """A text, cut into equal windows.

    Args:
        ids: [M, S] int64.
        sha256: hash of the text's bytes.
        name: its name in reports (a file name).
        note: what is unusual about the text; None if nothing is.
    """

    ids: np.ndarray
    sha256: str
    name: str
    note: str | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return int(self.ids.size)


def read_text(path: Path | None) -> tuple[str, str]:
    """A text and its name.

    Args: path: of a UTF-8 file; None for the text that is part of the package.
    Raises:
        TextError: there is no such file, or it is not UTF-8.
    """
    if path is None:
        resource = resources.files("gsx_exporter") / "data" / "calibration.txt"
        return resource.read_text(encoding="utf-8"), "gsx default text"
    if not path.is_file():
        raise TextError(f"{path}: no such text file")
    try:
        return path.read_text(encoding="utf-8"), path.name
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: is not UTF-8 text", found=str(error)) from error


def tokenize(
    checkpoint: Checkpoint, path: Path | None, *, max_tokens: int, window: int = WINDOW_TOKENS, skip: int = 0
) -> TokenText:
    """A text file as windows of tokens. Each begins with the special tokens that the tokenizer begins a text with.

    Args:
        checkpoint: its tokenizer and context length are used.
        path: UTF-8 text; None for the default text.
        max_tokens: read about this many at most (whole windows).
        window: tokens in a window; fewer if the text or the model's context is shorter.
        skip: number of tokens to leave out at the beginning.
    Raises:
        TextError: there is no such file; or the text, or what is left of it, is too short or consists almost entirely
            of one token.
        CheckpointError: the tokenizer is missing or does not fit the model.
    """
    from gsx_exporter.checkpoint.tokenizer import load_tokenizer  # `gsx bench` reads a text where none is installed

    tokenizer = load_tokenizer(checkpoint)
    text, name = read_text(path)
    window = min(window, checkpoint.config.max_positions)
    # A token rarely has more than 16 characters: more text than this would be thrown away.
    upto = skip + max_tokens
    try:
        prefix = tokenizer.encode("").ids
        encoded = tokenizer.encode(text[: 16 * upto], add_special_tokens=False)
    except Exception as error:  # the library raises a bare Exception, for example without a token for unknown words
        raise TextError(f"{name}: the tokenizer cannot read this text", found=str(error)) from error
    ids = encoded.ids[skip:upto]
    if len(ids) < MIN_TOKENS:
        raise TextError(
            f"{name}: the text is too short to calibrate on",
            expected=f"at least {MIN_TOKENS} tokens (tens of thousands are better)",
            found=f"{len(ids)} tokens" + (f" after the first {skip}" if skip else ""),
        )
    common = int(np.bincount(ids).argmax())
    share = ids.count(common) / len(ids)
    if share > MOST_OF_ONE:
        raise TextError(
            f"{name}: the tokenizer turns this text into almost nothing but one token",
            expected="ordinary text in a language that the model knows",
            found=f"{share:.0%} of its tokens are {tokenizer.id_to_token(common)!r}",
        )
    highest = max(ids)
    if highest >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.source}: the tokenizer does not fit the model",
            expected=f"token ids below {checkpoint.config.vocab_size}",
            found=str(highest),
        )
    body = min(window - len(prefix), len(ids))
    count = len(ids) // body
    rows = np.asarray(ids[: count * body], dtype=np.int64).reshape(count, body)
    start = np.tile(np.asarray(prefix, dtype=np.int64), (count, 1))
    note = None
    if tokenizer.get_vocab_size() >= _SMALL_VOCABULARY:
        note = _unfamiliar(text, name, encoded.offsets[skip:upto])
    return TokenText(np.concatenate([start, rows], axis=1), hashlib.sha256(text.encode()).hexdigest(), name, note)


def _unfamiliar(text: str, name: str, offsets: Sequence[tuple[int, int]]) -> str | None:
    """A note if the tokenizer knows a text only in pieces. Args: offsets: first and last character of the tokens."""
    size = len(text[offsets[0][0] : offsets[-1][1]].encode()) / len(offsets)
    if size >= LEAST_BYTES:
        return None
    inside = sum(text[max(start - 1, 0) : start + 1].isalnum() for start, _ in offsets if start) / len(offsets)
    return (
        f"{name}: {inside:.0%} of this text's tokens are pieces of words, and a token stands for {size:.1f} bytes; in "
        "a language that the model was made for it stands for 4 or 5. What is calibrated on it may not hold elsewhere."
    )


def text_after(checkpoint: Checkpoint, path: Path | None, seen: int, max_tokens: int) -> TokenText | None:
    """The part of a text after its first tokens, which something was fitted to; None if too little is left.

    Args: seen: number of first tokens to leave out; path, max_tokens: as for `tokenize`.
    """
    try:
        return tokenize(checkpoint, path, max_tokens=max_tokens, skip=seen)
    except TextError:
        return None
