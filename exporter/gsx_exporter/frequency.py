"""Which tokens a text has most often: the ones that a draft with a small vocabulary chooses among.

As FR-Spec (arXiv:2502.14856) does: the head of a draft needs only the rows of tokens that come often. A rare token is
never drafted, and the model writes it itself, so the text stays the model's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsx_exporter.text import read_text
from gsx_plugins.progress import OnProgress, Progress, silent

if TYPE_CHECKING:
    from gsx_exporter.checkpoint.checkpoint import Checkpoint

# Characters that are tokenized at once: a text may be larger than what its tokens should take in memory.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Frequency:
    """How often a text has each token.

    Args:
        counts: [V] int64.
        sha256: hash of the text's bytes.
        name: the text's name in reports.
    """

    counts: np.ndarray
    sha256: str
    name: str

    @property
    def tokens(self) -> int:
        """Number of tokens of the text."""
        return int(self.counts.sum())

    def most_frequent(self, count: int, always: tuple[int, ...]) -> tuple[int, ...]:
        """The `count` most frequent tokens, those of `always` among them, in ascending order.

        Of equally frequent ones, and so of those that the text does not have, the lower id is taken: ids of a
        tokenizer that merges pairs are in the order of the merges, frequent ones first.
        """
        rank = np.where(np.isin(np.arange(len(self.counts)), always), -self.counts.max() - 1, -self.counts)
        return tuple(int(token) for token in np.sort(np.argsort(rank, kind="stable")[:count]))

    def covered(self, tokens: tuple[int, ...]) -> float:
        """The share of the text's tokens that are among these."""
        return float(self.counts[list(tokens)].sum() / self.counts.sum())


def count_tokens(checkpoint: Checkpoint, path: Path | None, on_progress: OnProgress = silent) -> Frequency:
    """Count the tokens of a whole text.

    Args: path: UTF-8 text that `tokenize` accepts; None for the default text.
    """
    from gsx_exporter.checkpoint.tokenizer import load_tokenizer  # as in `tokenize`

    tokenizer = load_tokenizer(checkpoint)
    text, name = read_text(path)
    counts, pieces = np.zeros(checkpoint.config.vocab_size, np.int64), list(_pieces(text))
    for number, piece in enumerate(pieces):
        on_progress(Progress("counting tokens", number, len(pieces)))
        ids = tokenizer.encode(piece, add_special_tokens=False).ids
        counts += np.bincount(ids, minlength=len(counts))[: len(counts)]
    return Frequency(counts, hashlib.sha256(text.encode()).hexdigest(), name)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end with a line, where lines are not longer than a piece."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start and start + _PIECE < len(text) else start + _PIECE
        yield text[start:end]
        start = end
