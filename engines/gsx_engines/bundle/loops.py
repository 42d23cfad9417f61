"""Looped models: a stretch of layers runs several times, and each run of a layer is a visit.

A loop is one pass through the looped layers. To everything that comes after the weights, a visit is a layer: it has a
number of its own, in the order in which the model runs, a K/V cache and decisions. Only the weights know that visits of
one layer share them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gsx_engines.bundle.fields import Section
from gsx_plugins.errors import UsageError

# Which K/V caches looped layers have: one for each loop, or one, which holds what the last loop that a token ran gave.
LoopCaches = Literal["per_loop", "last_loop"]


class Loops(Section):
    """How the layers of a looped model run.

    Args:
        before, looped, after: layers that run once, that each loop runs, and that run once after the last loop.
        most: the largest number of loops.
        default: how many run if a request says nothing.
        caches: the K/V caches of looped layers. With `last_loop`, earlier loops of a call see what the last loop gave
            the tokens before the call, and what they themselves give the tokens of the call.
    """

    before: Annotated[int, Field(ge=0)]
    looped: Annotated[int, Field(ge=1)]
    after: Annotated[int, Field(ge=0)]
    most: Annotated[int, Field(ge=1)]
    default: Annotated[int, Field(ge=1)]
    caches: LoopCaches = "per_loop"

    @model_validator(mode="after")
    def _default_is_possible(self) -> Loops:
        if self.default > self.most:
            raise ValueError(f"{self.default} loops by default are more than the most, {self.most}")
        return self

    @property
    def layers(self) -> int:
        """How many layers have weights."""
        return self.before + self.looped + self.after

    @cached_property
    def visits(self) -> tuple[int, ...]:
        """The layer of each visit, in order."""
        first = self.before + self.looped
        again = tuple(range(self.before, first)) * self.most
        return (*range(self.before), *again, *range(first, self.layers))

    @property
    def share_caches(self) -> bool:
        """Whether several visits use one cache."""
        return self.caches == "last_loop" and self.most > 1

    def cache_of(self, visit: int) -> int:
        """The number of a visit's K/V cache: its own, or that of its layer."""
        return self.visits[visit] if self.share_caches else visit

    def leaves_cache(self, visit: int) -> bool:
        """Whether K and V of a visit stay in its cache: no later loop replaces them."""
        return not self.share_caches or self.loop_of(visit) in (None, self.most - 1)

    def loop_of(self, visit: int) -> int | None:
        """The loop that a visit belongs to, counted from 0; None for layers that run once."""
        inside = visit - self.before
        return inside // self.looped if 0 <= inside < self.looped * self.most else None

    def begins(self, visit: int) -> bool:
        """Whether a loop begins at a visit."""
        return self.loop_of(visit) is not None and (visit - self.before) % self.looped == 0

    @cached_property
    def optional(self) -> tuple[int, ...]:
        """The visits that fewer loops leave out: those of all loops but the first."""
        return tuple(range(self.before + self.looped, self.before + self.looped * self.most))

    @property
    def ends(self) -> tuple[int, ...]:
        """The numbers of visits after which a loop ends, all but the last."""
        return tuple(self.before + self.looped * count for count in range(1, self.most))

    def run_by(self, loops: int) -> tuple[int, ...]:
        """The visits that a number of loops runs."""
        return tuple(n for n in range(len(self.visits)) if (self.loop_of(n) or 0) < loops)

    def check(self, loops: int, what: str) -> None:
        """Refuse a number of loops.

        Raises:
            UsageError: it is not one from 1 to the most.
        """
        if not 1 <= loops <= self.most:
            raise UsageError(f"{what} is out of range", expected=f"1 to {self.most}", found=str(loops))
