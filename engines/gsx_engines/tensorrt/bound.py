"""The memory on the device that a runner lets an engine use in a call."""

from __future__ import annotations

from typing import Any


class BoundBuffers(dict[str, tuple[Any, tuple[int, ...]]]):
    """Memory and shapes of inputs and outputs that stay on the device, by name.

    Must not be changed once a call has used it: a call with the object of the call before does not bind it again.
    (A class of its own, since a plain dict has no weak references.)
    """
