"""The measurements at one setting of the keep rule."""

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
    """All measurements at one setting of the keep rule.

    Args:
        setting: its name; budget: the share of skippable work that it requests to keep.
        kept: [L][attn, mlp] shares of tokens that the reference keeps; 1 where there is no gate.
        kept_share: over all gated branches; None for a dense model.
        windows: whole windows in one call.
        rounding: the reference in float32 against itself in float64, over the same windows; None if it is in float32.
        single_steps, one_chunk: half of a stretch, then the rest with the cache; None with rank selection.
        padded: two sequences of different lengths in one batch.
        fast_logits: logits of the runner that generates, over whole windows, against the reference's (quantized:
            the portable runner's); fast_wrong_counts: how often it kept another number of rows although no decision
            was a near tie.
        greedy: by runner, "fast" and "portable".
        speculation: results of the bundle's draft; None if it has no draft.
        reference_nats, engine_nats: mean loss per token, over `scored_tokens` tokens.
        quality: the quality that the engine's arithmetic costs.
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
        """The engine's perplexity relative to the reference's, minus 1; below 0 if it fell."""
        return math.expm1(self.engine_nats - self.reference_nats)
