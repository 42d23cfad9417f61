"""A client's request, and what the client is told while a scheduler works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings
from gsx_engines.generation.continuation import FinishReason
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.sampling import GREEDY, Sampling, TokenLogprobs
from gsx_plugins.errors import GsxError


class OverloadedError(GsxError):
    """The request was not accepted, and may be sent again later: the queue is full, or the server is shutting down."""


class ClosingError(OverloadedError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


@dataclass(frozen=True)
class Request:
    """One text to continue; the terms are those of `gsx generate`.

    Args:
        prompt: token ids.
        max_new_tokens: the maximum.
        keep: what it asks of the keep rule.
        sampling: how tokens are chosen.
        stop: texts that end the generation; they are left out of the text.
        stop_ids: tokens that end it, left out of the text too; None for the model's end-of-text tokens.
        speculative: draft and verify with the bundle's draft. The text is the same. It comes sooner if there are no
            other requests, but the request does not share steps with others.
        draft_length: tokens drafted before a verification; None to find it while generating.
        prompt_logprobs: report log-probabilities of the prompt's tokens too, except of the first.
        kept: report which branches each token kept.
        logprobs: report each token's log-probability, and those of so many likeliest tokens; None for none.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    keep: KeepSettings = AS_EXPORTED
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None
    speculative: bool = False
    draft_length: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    kept: bool = False


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a request.

    Args:
        ids: the tokens.
        text: what they complete, which may be empty.
        logprobs: of each token, if the request wants them.
        kept: for each token that the model read to choose these, [L, 2] int64: 1 where that token ran the branch; if
            the request wants it, and the runtime tells. The prompt has none.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    kept: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Finished:
    """How a request ended.

    Args:
        finish: why it ended, as in `gsx generate`.
        waited_seconds: from its arrival to its prefill.
        first_token_seconds: from its arrival to its first token.
        prompt_logprobs: of the prompt's tokens behind the first, if the request wants them.
        stats: its own counters. The decoding time is elapsed time, including the work for other requests in the same
            steps; kept and gated rows are 0 if the runtime only counts them for whole batches, and are those of tokens
            that were read for this request.
        cached_tokens: how many tokens of the prompt were not read, since their K/V were there already.
    """

    finish: FinishReason
    waited_seconds: float
    first_token_seconds: float
    stats: GenerationStats
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0


class Client(Protocol):
    """The receiver of a request's results. All calls come from the scheduler's thread; the last one is `finished`,
    `failed` or `dropped`."""

    def tokens(self, new: NewTokens) -> None:
        """Take new tokens."""
        ...

    def finished(self, result: Finished) -> None:
        """The request has ended normally."""
        ...

    def failed(self, error: Exception) -> None:
        """The request could not be carried out."""
        ...

    def is_gone(self) -> bool:
        """Whether the client no longer waits for the result."""
        ...

    def dropped(self) -> None:
        """The request was ended because the client no longer waits for it."""
        ...


class Nobody:
    """A client that only remembers why its request failed."""

    error: Exception | None = None

    def tokens(self, new: NewTokens) -> None:
        """See `Client`."""

    def finished(self, result: Finished) -> None:
        """See `Client`."""

    def failed(self, error: Exception) -> None:
        """See `Client`."""
        self.error = error

    def is_gone(self) -> bool:
        """See `Client`."""
        return False

    def dropped(self) -> None:
        """See `Client`."""
