"""What was measured at one setting of the keep rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gsx.parity.closeness import Compared, Comparison
from gsx.parity.measure import Greedy
from gsx.parity.quality import Quality
from gsx.parity.speculation import SpeculationResult


@dataclass(frozen=True)
class BudgetResult:
    """All that was measured at one setting of the keep rule.

    Args:
        setting: its name; budget: the share of skippable work that it asks to keep.
        kept: [L][attn, mlp] shares that the reference keeps; 1 where there is no gate.
        kept_share: over all gated branches; None for a dense model.
        windows: whole windows in one call.
        rounding: the reference in float32 beside itself in float64, over the same; None where it is in float32.
        single_steps, one_chunk: half a stretch, then the rest over the cache; None with rank selection.
        padded: two sequences of different lengths in one batch.
        fast_logits: logits of the runner that generates, over whole windows, against the reference's (quantized:
            the portable runner's); fast_wrong_counts: how often it kept another number of rows, no decision being
            a near tie.
        greedy: by runner, "fast" and "portable".
        speculation: of the bundle's draft; None where it has none.
        reference_nats, engine_nats: mean loss per token, over `scored_tokens` tokens.
        quality: what the engine's arithmetic costs.
    """

    setting: str
    budget: float
    kept: tuple[tuple[float, float], ...]
    kept_share: float | None
    windows: Compared
    rounding: Compared | None
    single_steps: Compared | None
    one_chunk: Compared | None
    padded: Compared
    fast_logits: Comparison
    fast_wrong_counts: int
    greedy: Mapping[str, Greedy]
    speculation: SpeculationResult | None
    reference_nats: float
    engine_nats: float
    scored_tokens: int
    quality: Quality

    @property
    def perplexity_increase(self) -> float:
        """Of the engine over the reference, relative; below 0 where it fell."""
        return math.expm1(self.engine_nats - self.reference_nats)
