"""A call of the model for the sequences in the rows of a cache, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.generation.continuation import Continuation
from gsx_engines.runners.base import Cache, Logits, Runner, StepOutput

Rows = Sequence[Continuation | None]


def read(runner: Runner, cache: Cache, rows: Rows, controls: RuntimeValues, logits: Logits = "last") -> StepOutput:
    """Have the model read the unread tokens of each sequence; `take` then chooses their next tokens.

    Args:
        runner: the model.
        cache: its cache.
        rows: the sequences by their rows in the cache; None, and sequences that have ended, are left out.
        controls: as in `Call`, for all rows.
        logits: as in `Runner.step`.
    """
    unread = [sequence.unread if sequence is not None and sequence.left else () for sequence in rows]
    return read_tokens(runner, cache, unread, controls, logits)


def read_tokens(
    runner: Runner, cache: Cache, unread: Sequence[Sequence[int]], controls: RuntimeValues, logits: Logits
) -> StepOutput:
    """Have the model read some tokens of each row; the rest is as for `read`."""
    counts = list(map(len, unread))
    ids = np.zeros((len(counts), max(counts)), np.int64)
    for row, tokens in enumerate(unread):
        ids[row, : len(tokens)] = tokens
    return runner.step(cache, ids, controls, counts=counts, logits=logits)


def take(rows: Rows, output: StepOutput) -> None:
    """Choose the next token of every sequence that has not ended; output: of `read` with the same rows."""
    for row, sequence in enumerate(rows):
        if sequence is not None and sequence.left:
            sequence.take(output.behind(row, 0))
