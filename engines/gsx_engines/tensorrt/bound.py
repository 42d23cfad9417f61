"""What a call of an engine leaves on the device, as the runner says it to the engine."""

from __future__ import annotations

from typing import Any


class BoundBuffers(dict[str, tuple[Any, tuple[int, ...]]]):
    """Memory and shapes of inputs and outputs that stay on the device, by name. Nothing may be changed in it: a call
    with the same object as the one before it binds none of them again."""
