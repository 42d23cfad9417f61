"""How much of the text each check reads.

By default the setting that the bundle was exported for is checked on the whole text, and the others on a part of it:
enough to find a fault, which shows at every token, but not to judge quality, which is a mean over many. `--full` checks
everything on all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gsx.parity.speculation import FULL_TEXTS, TEXTS, Texts
from gsx_exporter.rules.settings import Setting

# Windows of which states, K and V are compared: a wrong weight, mask or position shows in every one.
_COMPARED_WINDOWS = 2
# At the other settings.
_OTHER_WINDOWS, _OTHER_GREEDY_TOKENS = 1, 32
# Single steps with the cache are as slow as generating: half of these tokens are read one by one.
_CACHED_TOKENS, _OTHER_CACHED_TOKENS = 64, 32
# A rule that ranks the tokens of a call must be read step by step by the reference, which is slow at it.
_RANKED_GREEDY_TOKENS, _OTHER_RANKED_GREEDY_TOKENS = 32, 8


@dataclass(frozen=True)
class Scope:
    """How much is measured at one setting.

    Args:
        windows: number of windows of text on which logits, decisions and quality are compared.
        compared: how many of them on which states, K and V are compared too, by both runners.
        rounded: on how many the reference's own rounding is measured, if it is in float64. At every setting: what is
            left of a model that was not trained to skip rounds more than the whole (measured: 3.6 times).
        greedy_tokens: length of the greedy text.
        portable_greedy: whether the portable runner reads that text too, token by token.
        cached_tokens: length of the stretch that is read with the cache.
        texts: speculative texts; None for none.
        part: whether this is less than the whole text, so that too few tokens for a limit of quality are no finding.
    """

    windows: int
    compared: int
    rounded: int
    greedy_tokens: int
    portable_greedy: bool
    cached_tokens: int
    texts: Texts | None
    part: bool


def scopes(
    settings: Sequence[Setting], main: Sequence[Setting], *, windows: int, greedy_tokens: int, causal: bool, full: bool
) -> dict[Setting, Scope]:
    """The scope of each setting.

    Args:
        main: those that are checked on the whole text.
        windows, greedy_tokens: what was asked for.
        causal: whether a decision depends only on a token's past.
        full: whether all are checked on everything.
    """
    ranked = _RANKED_GREEDY_TOKENS, _OTHER_RANKED_GREEDY_TOKENS
    longest, other = (greedy_tokens, _OTHER_GREEDY_TOKENS) if causal or full else ranked
    everything = Scope(windows, windows, windows, greedy_tokens, True, _CACHED_TOKENS, FULL_TEXTS, False)
    compared = min(windows, _COMPARED_WINDOWS)
    whole = Scope(windows, compared, 1, min(longest, greedy_tokens), False, _CACHED_TOKENS, TEXTS, False)
    few = min(windows, _OTHER_WINDOWS)
    part = Scope(few, few, few, min(other, greedy_tokens), False, _OTHER_CACHED_TOKENS, None, few < windows)
    return {setting: everything if full else whole if setting in main else part for setting in settings}
