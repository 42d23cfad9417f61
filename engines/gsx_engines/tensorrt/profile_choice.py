"""Choosing the optimization profile of an engine for a call; `gsx_engines.building.profiles` explains profiles."""

from __future__ import annotations

from collections.abc import Sequence

from gsx_engines.bundle.engine_entry import EngineProfile, Sizes
from gsx_engines.errors import EngineError


def choose_profile(profiles: Sequence[EngineProfile], batch: int, tokens: int, window: int) -> int:
    """Number of the profile for a call: of those that fit, the one with the lowest maximum of tokens.

    Args:
        profiles: of the engine.
        batch, tokens, window: sequences, tokens of each, and cache columns of the call.
    Raises:
        EngineError: none fits; says which axis is out of which range.
    """
    call = {"batch": batch, "tokens": tokens, "window": window}
    fitting = [
        number
        for number, profile in enumerate(profiles)
        if all(getattr(profile, axis).least <= size <= getattr(profile, axis).most for axis, size in call.items())
    ]
    if fitting:
        return min(fitting, key=lambda number: profiles[number].tokens.most)
    ranges = "; ".join(
        f"{profile.name}: " + ", ".join(f"{axis} {_span(getattr(profile, axis))}" for axis in call)
        for profile in profiles
    )
    outside = [
        axis
        for axis, size in call.items()
        if not any(getattr(profile, axis).least <= size <= getattr(profile, axis).most for profile in profiles)
    ]
    why = f"{' and '.join(outside)} out of range in each" if outside else "each has some axis out of range"
    raise EngineError(
        f"no profile of the engine fits this call: {why}",
        expected=ranges,
        found=", ".join(f"{axis} {size}" for axis, size in call.items()),
        todo="build with wider ranges: gsx build --context, --batch or --profile",
    )


def most_tokens(profiles: Sequence[EngineProfile], batch: int) -> int:
    """The most tokens of each sequence that fit into one call; 0 if no profile allows so many sequences."""
    fits = [profile.tokens.most for profile in profiles if profile.batch.least <= batch <= profile.batch.most]
    return max(fits, default=0)


def most_rows(profiles: Sequence[EngineProfile]) -> int:
    """The most tokens of a call, summed over all sequences."""
    return max(profile.batch.most * profile.tokens.most for profile in profiles)


def _span(sizes: Sizes) -> str:
    return str(sizes.least) if sizes.least == sizes.most else f"{sizes.least} to {sizes.most}"
