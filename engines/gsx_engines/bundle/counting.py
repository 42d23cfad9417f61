"""How many tokens `rank` selection keeps: the one function that the exporter, the graphs' tests and runners share."""

from __future__ import annotations

# A budget is a decimal of at most six places, so that counting is a matter of whole numbers.
BUDGET_PLACES = 6
_MILLION = 10**BUDGET_PLACES


def kept_count(n: int, budget: float) -> int:
    """K, how many of n tokens `rank` selection keeps.

    Args:
        n: valid tokens of the call: neither padding nor end-of-text.
        budget: read as a decimal of six places, since at run time it arrives as a float32.
    Rule: docs/design.md section 3: K = n when budget >= 1 or n <= 1, else n - 1 - floor((1 - budget) * (n - 1)),
        where floor must not fall for a product that floating point made a little too small.
    """
    millionths = round(budget * _MILLION)
    if millionths >= _MILLION or n <= 1:
        return n
    return n - 1 - (_MILLION - millionths) * (n - 1) // _MILLION
