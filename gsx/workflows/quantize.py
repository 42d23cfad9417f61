"""What `gsx export` is asked to quantize."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gsx.parity.quality import QualityLimits
from gsx_engines.bundle.manifest import SchemeName
from gsx_plugins.errors import UsageError

NONE = "none"


@dataclass(frozen=True)
class Quantize:
    """What `gsx export` quantizes to 8 or 4 bits.

    Args:
        scheme: `int8`, `fp8`: weights and activations; `int8-weights`, `int4`: only weights.
        keep_precision: matrices to leave in high precision besides those that the scheme itself leaves, by name or
            pattern ("layers.0", "layers.*.mlp.down", "lm_head"); "none" quantizes everything, and spares nothing to
            meet a limit.
        max_divergence, max_perplexity_increase, max_flipped: limits on text after the calibration text, at
            the exported budget, against full precision (0.01 is one percent); None for the limits of `gsx verify`.
        cache: folder that keeps statistics between exports; None to keep none.
    Raises:
        UsageError: a limit is not a positive share, or "none" is given together with names.
    """

    scheme: SchemeName
    keep_precision: tuple[str, ...] = ()
    max_divergence: float | None = None
    max_perplexity_increase: float | None = None
    max_flipped: float | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_divergence", "max_perplexity_increase", "max_flipped"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(name.replace("_", " "), expected="a number above 0, e.g. 0.01", found=f"{value:g}")
        if NONE in self.keep_precision and len(self.keep_precision) > 1:
            raise UsageError(
                "keep precision: none cannot be combined with names",
                expected="none, or names",
                found=",".join(self.keep_precision),
            )

    @property
    def limits(self) -> QualityLimits:
        """The limits that were given; the others are None."""
        return QualityLimits(self.max_perplexity_increase, self.max_flipped, self.max_divergence)

    @property
    def everything(self) -> bool:
        """Whether everything is quantized, whatever it costs."""
        return NONE in self.keep_precision
