"""Optimization profiles: which calls an engine supports.

A call has B sequences, S tokens of each, and reads a window of W columns of the cache. TensorRT tunes an engine for
ranges of these, and prefill and decoding differ so much that each gets its own profile. TensorRT-RTX compiles kernels
on the GPU for the shapes that occur, and its engines hold a copy of the weights for every profile (as of 1.7.1), so it
gets only one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gsx_engines.bundle.engine_entry import EngineProfile, Sizes
from gsx_plugins.errors import UsageError

# Longer prompts are split over several calls.
DEFAULT_PREFILL_TOKENS = 1024
_RANGE = r"(\d+)(?:-(\d+)(?:-(\d+))?)?"
_PROFILE = re.compile(rf"([a-z][a-z0-9_]*):{_RANGE}(?::{_RANGE})?")
_EXAMPLE = "NAME:TOKENS[:BATCH], each LEAST-USUAL-MOST, LEAST-MOST or one number: prefill:2-128-1024:1-1-4"


def default_profiles(capacity: int, batch: int) -> tuple[EngineProfile, ...]:
    """One profile for prompts and one for single tokens.

    Args:
        capacity: columns of the cache.
        batch: the most sequences in a call.
    """
    most = min(DEFAULT_PREFILL_TOKENS, capacity)
    prefill = _profile("prefill", Sizes(min(2, most), max(min(2, most), most // 4), most), _batch(batch), capacity)
    return prefill, _profile("decode", Sizes(1, 1, 1), _batch(batch), capacity)


def one_profile(capacity: int, batch: int) -> tuple[EngineProfile]:
    """One profile for all calls; arguments as in `default_profiles`."""
    most = min(DEFAULT_PREFILL_TOKENS, capacity)
    return (_profile("any", Sizes(1, max(1, most // 4), most), _batch(batch), capacity),)


def parse_profile(text: str, *, capacity: int, batch: int) -> EngineProfile:
    """Parse a profile as given on the command line, e.g. "prefill:2-128-1024" or "decode:1:1-1-8".

    Args:
        text: the profile.
        capacity: columns of the cache, which no call may exceed.
        batch: the most sequences, if the text does not say.
    Raises:
        UsageError: the text has another form, or numbers are out of order.
    """
    match = _PROFILE.fullmatch(text)
    if match is None:
        raise UsageError("--profile has another form", expected=_EXAMPLE, found=repr(text))
    name, *numbers = match.groups()
    tokens = _sizes(numbers[:3])
    sequences = _sizes(numbers[3:]) if numbers[3] else _batch(batch)
    for axis, sizes in (("tokens", tokens), ("batch", sequences)):
        if not 1 <= sizes.least <= sizes.usual <= sizes.most:
            raise UsageError(
                f"--profile {text}: the numbers for {axis} are out of order",
                expected="1 <= least <= usual <= most",
                found="-".join(map(str, sizes)),
            )
    if tokens.most > capacity:
        raise UsageError(
            f"--profile {text}: more tokens than the cache has columns",
            expected=f"at most {capacity}",
            found=str(tokens.most),
            todo="--context gives the cache more columns",
        )
    return _profile(name, tokens, sequences, capacity)


def _profile(name: str, tokens: Sizes, batch: Sizes, capacity: int) -> EngineProfile:
    usual = max(tokens.usual, min(capacity, max(capacity // 4, tokens.usual)))
    return EngineProfile(name=name, batch=batch, tokens=tokens, window=Sizes(tokens.least, usual, capacity))


def _batch(most: int) -> Sizes:
    return Sizes(1, 1, most)


def _sizes(numbers: Sequence[str | None]) -> Sizes:
    given = [int(number) for number in numbers if number]
    return Sizes(given[0], given[min(1, len(given) - 1)], given[-1])
