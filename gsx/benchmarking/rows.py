"""The rows of the report of `gsx bench`: what each form takes at one shape of calls, next to the first form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gsx.benchmarking.measure import Answers, Shape
from gsx.benchmarking.rounds import Spread, ratios, spread

_Found = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Timing:
    """One kind of call of one form.

    Args:
        milliseconds: over the rounds.
        ratio: to the first form's time in the same round; below 1 is faster.
        left: the work of this call as a share of the first form's, which the time cannot fall below if nothing else
            changes; None with a draft.
    """

    milliseconds: Spread
    ratio: Spread
    left: float | None

    @property
    def over(self) -> float | None:
        """How much longer it takes than the work that is left, relative to that."""
        return None if self.left is None else self.ratio.median / self.left - 1


@dataclass(frozen=True)
class BenchRow:
    """A form at one shape of calls.

    Args:
        form: its name. bundle: its directory. setting: the keep settings in words. draft: the draft in use.
        prompt_tokens, batch: of the calls.
        rounds: how many counted.
        prompt_kept, kept: share of skippable work that ran, in prompts and for the tokens after them; None for a dense
            model and with a draft.
        first: of the prompts, until the first tokens are chosen; its work is floating-point operations.
        token: of each later token of all sequences together; its work is bytes. None without later tokens.
        tokens_per_second: new tokens of all sequences.
        accepted: tokens in a verification; None without a draft.
        peak_mb: peak memory of the bundle's process by the end of these calls.
        same_text: whether it wrote the tokens of the first form.
    """

    form: str
    bundle: str
    setting: str
    draft: str | None
    prompt_tokens: int
    batch: int
    rounds: int
    prompt_kept: float | None
    kept: float | None
    first: Timing
    token: Timing | None
    tokens_per_second: float | None
    accepted: float | None
    peak_mb: float
    same_text: bool


def rows_of(shape: Shape, answers: Answers, labels: Mapping[str, tuple[str, str, str | None]]) -> list[BenchRow]:
    """The rows of one shape. Args: labels: of each form its bundle, setting and draft."""
    base = next(iter(answers.values()))
    rows = []
    for name, found in answers.items():
        token = _timing(found, base, "token", "bytes") if found[-1]["token"] is not None else None
        bundle, setting, draft = labels[name]
        rows.append(
            BenchRow(
                form=name,
                bundle=bundle,
                setting=setting,
                draft=draft,
                prompt_tokens=shape.prompt_tokens,
                batch=shape.batch,
                rounds=len(found),
                prompt_kept=found[-1]["prompt_kept"],
                kept=found[-1]["kept"],
                first=_timing(found, base, "first", "flops"),
                token=token,
                tokens_per_second=1000 * shape.batch / token.milliseconds.median if token else None,
                accepted=found[-1]["accepted"],
                peak_mb=found[-1]["peak_mb"],
                same_text=found[-1]["tokens"] == base[-1]["tokens"],
            )
        )
    return rows


def _timing(found: _Found, base: _Found, seconds: str, work: str) -> Timing:
    times, others = ([one[seconds] for one in answers] for answers in (found, base))
    mine, first = found[-1][work], base[-1][work]
    left = mine / first if mine is not None and first is not None else None
    return Timing(spread([1000 * one for one in times]), ratios(times, others), left)
