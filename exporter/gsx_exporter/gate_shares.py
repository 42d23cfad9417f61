"""How a budget is divided among the gates of a model: every branch the same, or some skip more than others.

Branches differ by orders of magnitude in what skipping them costs (benchmarks/RESULTS.md, "Training gates on a real
model"). A gate's weight says how much of the skipping it takes; the budget stays the share of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of the factor; shares are then within 1e-9 of the ones that meet the budget.
_BISECTIONS = 80


def kept_shares(weights: Sequence[float], budget: float) -> list[float]:
    """The share of tokens that each gate keeps: 1 - min(1, factor * weight), with their mean at the budget.

    Args:
        weights: of each gate, at least 0; 0 keeps all. Equal weights give the budget itself to each.
        budget: in (0, 1].
    Returns: shares. If the gates of weight 0 keep more than the budget by themselves, the others keep nothing.
    """
    positive = [weight for weight in weights if weight > 0.0]
    wanted = (1.0 - budget) * len(weights)
    if wanted >= len(positive):
        return [0.0 if weight > 0.0 else 1.0 for weight in weights]
    if len(set(positive)) == 1:  # exact, so that counts of kept tokens follow the budget to the token
        return [1.0 - wanted / len(positive) if weight > 0.0 else 1.0 for weight in weights]
    low, high = 0.0, 1.0 / min(positive)
    for _ in range(_BISECTIONS):
        factor = (low + high) / 2
        if sum(min(1.0, factor * weight) for weight in positive) < wanted:
            low = factor
        else:
            high = factor
    return [1.0 - min(1.0, high * weight) for weight in weights]
