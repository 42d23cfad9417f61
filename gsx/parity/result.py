"""The measurements at one setting of the keep rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gsx.parity.closeness import Compared
from gsx.parity.difference import Comparison
from gsx.parity.greedy import Greedy
from gsx.parity.quality import Quality
from gsx.parity.speculation import SpeculationResult

# Weights that are not finite or far out of scale give losses that no perplexity shows.
_MOST_NATS = 50


@dataclass(frozen=True)
class Tokens:
    """How many tokens each kind of check read at a setting.

    Args:
        windows: logits, decisions and quality.
        compared: of them, states, K and V, and the fast runner's logits.
        rounded: of them, the reference's own rounding.
        cached, padded: with the cache, and in a padded batch.
        greedy: of greedy text.
    """

    windows: int
    compared: int
    rounded: int
    cached: int
    padded: int
    greedy: int


@dataclass(frozen=True)
class BudgetResult:
    """All measurements at one setting of the keep rule.

    Args:
        setting: its name; budget: the share of skippable work that it requests to keep.
        kept: [L][attn, mlp] shares of tokens that the reference keeps; 1 where there is no gate.
        kept_share: over all gated branches; None for a dense model.
        windows: whole windows in one call.
        rounding: the reference in float32 against itself in float64; None if it is in float32.
        single_steps, one_chunk: half of a stretch, then the rest with the cache; None with rank selection.
        padded: two sequences of different lengths in one batch; None for a sample.
        fast_logits: logits of the runner that generates, over whole windows, against the reference's (quantized:
            the portable runner's); None for a sample. fast_wrong_counts: how often it kept another number of rows
            although no decision was a near tie.
        greedy: by runner, "fast" and, if it was asked for, "portable".
        speculation: results of the bundle's draft; None if it has no draft.
        reference_nats, engine_nats: mean loss per token, over `scored_tokens` tokens; frequency_nats: of a guess by how
            often each of them occurs, which needs no model.
        quality: the quality that the engine's arithmetic costs.
        tokens: how many each check read; part: whether they are only a part of the text, too few to judge quality.
    """

    setting: str
    budget: float
    kept: tuple[tuple[float, float], ...]
    kept_share: float | None
    windows: Compared
    rounding: Compared | None
    single_steps: Compared | None
    one_chunk: Compared | None
    padded: Compared | None
    fast_logits: Comparison | None
    fast_wrong_counts: int
    greedy: Mapping[str, Greedy]
    speculation: SpeculationResult | None
    reference_nats: float
    engine_nats: float
    frequency_nats: float
    scored_tokens: int
    quality: Quality
    tokens: Tokens
    part: bool

    @property
    def judgeable(self) -> bool:
        """Whether the reference predicts this text better than a guess by frequencies. If not, as with random weights,
        its next-token distribution has nothing to lose, and that an engine keeps it shows nothing."""
        return self.reference_nats < self.frequency_nats

    @property
    def perplexity_increase(self) -> float:
        """The engine's perplexity relative to the reference's, minus 1; below 0 if it fell."""
        return self.quality.estimates.perplexity.value


def perplexity_text(nats: float) -> str:
    """The perplexity of a mean loss, in digits if they can be read."""
    return f"{math.exp(nats):,.4f}" if nats < _MOST_NATS else f"e^{nats:.0f}"
