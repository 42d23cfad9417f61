"""Vectors of `draft_length.json`: how far to draft, after the rounds so far."""

from __future__ import annotations

from typing import Any

from gsx_engines.speculation.length import AdaptiveLength, Round
from tests.vectors.toy import float_text, mix


def vectors() -> list[dict[str, Any]]:
    """Rounds with made-up times: what the rule says before each, and after it about another token."""
    cases = []
    for seed, (first, cost) in enumerate([(4, 0.3), (2, 0.05), (4, 0.9), (7, 0.15)]):
        rule = AdaptiveLength(first)
        rounds = []
        for number in range(80):
            wanted = rule.next()
            chance = (mix(seed, number) % 100) / 100
            goes_on = [rule.goes_on(drafted, chance**drafted) for drafted in (1, 2, 5)]
            length = min(wanted, 1 + mix(seed, number, 1) % 6) if wanted else 0
            right = mix(seed, number, 2) % (length + 1)
            one = Round(
                length,
                1.0 + right,
                right,
                int(right < length),
                length * 0.625,
                cost * length * (1 + (mix(seed, number, 3) % 16) / 64),
                1 + length * 0.0625 * (mix(seed, number, 4) % 3),
            )
            rule.learn(one)
            # Of a round: what was asked, what was answered, what was learned.
            rounds.append(
                {
                    "next": wanted,
                    "chance": float_text(chance),
                    "goes_on": goes_on,
                    "length": one.length,
                    "accepted": one.accepted,
                    "rejected": one.rejected,
                    "seconds": [float_text(one.draft_seconds), float_text(one.verify_seconds)],
                    "acceptance": float_text(rule.acceptance),
                }
            )
        cases.append({"first": first, "rounds": rounds})
    return cases
