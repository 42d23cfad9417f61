"""The loss of quality that a user accepts, and whether a measurement shows that it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gsx.parity.estimate import Estimate
from gsx_plugins.errors import UsageError

Verdict = Literal["within", "over", "too few tokens"]


@dataclass(frozen=True)
class Limit:
    """The limit.

    Args:
        divergence: largest mean KL divergence of the next-token distributions from the whole model's, in nats; None for
            no such limit.
        same: least share of tokens whose most likely next token is the whole model's; None for no such limit.
    Raises:
        UsageError: a number that is none.
    """

    divergence: float | None
    same: float | None

    def __post_init__(self) -> None:
        if self.divergence is not None and not (math.isfinite(self.divergence) and self.divergence > 0):
            raise UsageError("--max-loss", expected="nats above 0, e.g. 0.02", found=f"{self.divergence:g}")
        if self.same is not None and not 0 < self.same < 1:
            raise UsageError("--min-same", expected="a share above 0 and below 1, e.g. 0.95", found=f"{self.same:g}")

    def __str__(self) -> str:
        parts = [] if self.divergence is None else [f"at most {self.divergence:g} nats"]
        parts += [] if self.same is None else [f"at least {self.same:.4g} of next tokens the same"]
        return " and ".join(parts)

    def verdict(self, divergence: Estimate, differing: Estimate) -> Verdict:
        """Whether a measurement shows that the limit holds. It may not: then the text was too short to tell."""
        checks = [(divergence, self.divergence)] if self.divergence is not None else []
        checks += [(differing, 1 - self.same)] if self.same is not None else []
        if any(not found.value <= limit for found, limit in checks):
            return "over"
        return "within" if all(found.decides(limit) for found, limit in checks) else "too few tokens"

    def times(self, divergence: Estimate, differing: Estimate, *, surely: bool = False) -> float:
        """How many times the limit the loss is; 1 is at the limit. Args: surely: by the near end of the interval."""
        checks = [(divergence, self.divergence)] if self.divergence is not None else []
        checks += [(differing, 1 - self.same)] if self.same is not None else []
        return max((found.low if surely else found.value) / limit for found, limit in checks)
