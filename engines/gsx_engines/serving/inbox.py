"""From the scheduler's thread to the server's event loop: what happens to the continuations of one HTTP request."""

from __future__ import annotations

import asyncio

from gsx_engines.serving.metrics import Metrics
from gsx_engines.serving.request import Finished, NewTokens

Event = NewTokens | Finished | Exception


class Inbox:
    """Events of an HTTP request in their order, each with the index of its choice. Made in the event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self.gone = False  # nobody waits for the answer any more
        self.metrics = metrics
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def put_after(self, seconds: float, event: Exception) -> None:
        """Add an event after some time, unless nobody waits any more. Called in the event loop, once."""
        self._timer = self._loop.call_later(seconds, self._events.put_nowait, (0, event))

    def leave(self) -> None:
        """Nobody waits any more: what is not finished is dropped. Called in the event loop."""
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()

    async def get(self) -> tuple[int, Event]:
        """The next event."""
        return await self._events.get()

    def put(self, index: int, event: Event) -> None:
        """Add an event, from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


class Choice:
    """The client of one continuation; see `Client`."""

    def __init__(self, inbox: Inbox, index: int) -> None:
        self._inbox, self._index = inbox, index

    def tokens(self, new: NewTokens) -> None:
        """See `Client`."""
        self._inbox.put(self._index, new)

    def finished(self, result: Finished) -> None:
        """See `Client`."""
        self._inbox.metrics.finished(result)
        self._inbox.put(self._index, result)

    def failed(self, error: Exception) -> None:
        """See `Client`."""
        self._inbox.metrics.count("failed")
        self._inbox.put(self._index, error)

    def is_gone(self) -> bool:
        """See `Client`."""
        return self._inbox.gone

    def dropped(self) -> None:
        """See `Client`."""
        self._inbox.metrics.count("cancelled")
