"""How many tokens `rank` selection keeps: one function, shared by the exporter, the graphs' tests and the runners."""

from __future__ import annotations

# A budget is a decimal of at most six places, so counting works on whole numbers.
BUDGET_PLACES = 6
_MILLION = 10**BUDGET_PLACES


def kept_count(n: int, budget: float) -> int:
    """K, how many of n tokens `rank` selection keeps.

    Args:
        n: valid tokens of the call: neither padding nor end-of-text.
        budget: rounded to six decimal places, since at run time it arrives as a float32.

    The rule (docs/design.md, section 3): K = n when budget >= 1 or n <= 1, else n - 1 - floor((1 - budget) * (n - 1)).
    Floating point could make the product slightly too small for the floor, so it is computed in whole numbers.
    """
    millionths = round(budget * _MILLION)
    if millionths >= _MILLION or n <= 1:
        return n
    return n - 1 - (_MILLION - millionths) * (n - 1) // _MILLION
