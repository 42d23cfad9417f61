"""What a client asks for, and what it is told while a scheduler works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gsx_engines.bundle.controls import AS_EXPORTED, Keep
from gsx_engines.generation import FinishReason, GenerationStats
from gsx_engines.sampling import GREEDY, Sampling
from gsx_plugins.errors import GsxError


class OverloadedError(GsxError):
    """The queue is full: the request was not taken, and may be sent again later."""


@dataclass(frozen=True)
class Request:
    """One text to continue; the words are those of `gsx generate`.

    Args:
        prompt: token ids.
        max_new_tokens: at most so many.
        keep: what it asks of the keep rule.
        sampling: how tokens are chosen.
        stop: texts that end the generation; they are left out of the text.
        speculative: draft and verify, with the bundle's draft. The text is the same; alone it comes sooner, but the
            request does not share its steps with others.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    keep: Keep = AS_EXPORTED
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    speculative: bool = False


@dataclass(frozen=True)
class Finished:
    """How a request ended.

    Args:
        finish: why; as of `gsx generate`.
        waited_seconds: from its arrival to its prefill.
        first_token_seconds: from its arrival to its first token.
        stats: its own counters. Its decoding time is the time that it took, other requests' parts of the same steps
            included; kept and gated rows are 0 where the runtime counts whole batches alone.
    """

    finish: FinishReason
    waited_seconds: float
    first_token_seconds: float
    stats: GenerationStats


class Client(Protocol):
    """Who asked. All calls come from the scheduler's thread; the last is `finished`, `failed` or `dropped`."""

    def tokens(self, ids: Sequence[int], text: str) -> None:
        """New tokens, and the text that is complete with them (which may be empty)."""
        ...

    def finished(self, result: Finished) -> None:
        """The end."""
        ...

    def failed(self, error: Exception) -> None:
        """The request could not be carried out."""
        ...

    def is_gone(self) -> bool:
        """Whether nobody waits for the rest."""
        ...

    def dropped(self) -> None:
        """The request ends here, since nobody waits for it."""
        ...
