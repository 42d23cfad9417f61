"""The parity report: the measurements, their checks, and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gsx.parity.checks import Check, Verdict, checks_of, wrong_default
from gsx.parity.quality import QualityLimits
from gsx.parity.result import BudgetResult, perplexity_text
from gsx.parity.tolerances import TOLERANCES, Tolerances
from gsx_exporter.rules.settings import LayerCurve
from gsx_exporter.text import WINDOW_TOKENS

# Of a check at several settings, the table shows the worst.
_WORST_LAST: tuple[Verdict, ...] = ("reported", "pass", "not judged", "too few tokens", "fail")
# The mean over more tokens will be another one, so more are asked for than this one needs.
_SPARE = 1.25


@dataclass(frozen=True)
class Row:
    """A line of the table: a check at the setting with its worst value, as text; "" for what it does not have."""

    name: str
    value: str
    interval: str
    limit: str
    verdict: Verdict
    reason: str
    setting: str
    detail: str
    tokens: str


@dataclass(frozen=True)
class BudgetRow:
    """A line of the second table: one setting, in words."""

    setting: str
    kept: str
    reference_perplexity: str
    engine_perplexity: str
    decisions: str
    quality: str
    tokens: str


@dataclass(frozen=True)
class KeepMap:
    """Which of the first tokens of a text keep which branch: keep[layer][attn, mlp][token]."""

    setting: str
    tokens: tuple[str, ...]
    keep: tuple[tuple[tuple[bool, ...], tuple[bool, ...]], ...]


@dataclass(frozen=True)
class Report:
    """The report of `gsx verify`.

    Args:
        bundle: its directory's name; model: the reference, as it was given.
        precision, quantization, kv_cache, policy, select, exported_budget, kv_policy: of the bundle. quantization and
            kv_cache are None in full precision, policy is None for a dense model, select if the rule has no thresholds.
            The exported budget of a set of layers is its share.
        quality_limits: apply at budgets from 1 down to the exported one; limits_given: those that the user gave.
        reference_precision: type of the reference's weights and activations.
        limits_of: which limits apply (`tolerances.kind_of`).
        branches: the branches that the keep rule may skip.
        text: name of the text; text_sha256: its hash; tokens: how many were read.
        results: one per budget, in descending order.
        default_is_exported: whether the graph's own default selection is the exported one; None for a dense model.
        notes: what was left out and why.
        layer_curves: curves from the keep rule's calibration.
        tools: versions of the tools.
    """

    bundle: str
    model: str
    weights_sha256: str
    family: str
    precision: str
    quantization: str | None
    kv_cache: str | None
    quality_limits: QualityLimits
    limits_given: QualityLimits
    reference_precision: str
    policy: str | None
    select: str | None
    exported_budget: float
    kv_policy: str
    limits_of: str
    branches: tuple[str, ...]
    text: str
    text_sha256: str
    tokens: int
    results: tuple[BudgetResult, ...]
    default_is_exported: bool | None
    notes: tuple[str, ...]
    keep_map: KeepMap | None
    layer_curves: tuple[LayerCurve, ...]
    tools: Mapping[str, str]
    seconds: float

    @property
    def rounds(self) -> bool:
        """Whether anything is in 8 bits."""
        return self.quantization is not None or self.kv_cache is not None

    @property
    def tolerances(self) -> Tolerances:
        """The limits that apply."""
        return TOLERANCES[self.limits_of]

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every check at every budget."""
        checks = [
            check
            for result in self.results
            for check in checks_of(result, self.tolerances, self._quality_limits(result))
        ]
        if self.default_is_exported is not None:
            checks.append(wrong_default(not self.default_is_exported))
        return tuple(checks)

    def _quality_limits(self, result: BudgetResult) -> QualityLimits:
        """Limits at a budget. Below the exported one, which the bundle was not made for, quality is only reported.

        In 16 bits the default limits come on top of those of numbers, and presume a model that can be judged: random
        weights lose more than trained ones.
        """
        if result.budget < self.exported_budget:
            return QualityLimits()
        return self.quality_limits if self.rounds or result.judgeable else self.limits_given

    @property
    def passed(self) -> bool:
        """Whether every check that has a limit is known to hold, and there was something to check."""
        return self.verdict == "passed"

    @property
    def verdict(self) -> Literal["passed", "failed", "not decided"]:
        """Not decided: nothing fails, but the text was too short for a limit, or the model cannot predict it."""
        verdicts = {check.verdict for check in self.checks}
        if "fail" in verdicts:
            return "failed"
        if verdicts & {"too few tokens", "not judged"}:
            return "not decided"
        return "passed" if "pass" in verdicts else "failed"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What the checks could not decide, and what to do, in sentences."""
        return (*self._not_judged(), *self._too_few_tokens())

    def _not_judged(self) -> list[str]:
        blind = [r for r in self.results if self._quality_limits(r) != QualityLimits() and not r.judgeable]
        if not blind:
            return []
        worst = max(blind, key=lambda result: result.reference_nats)
        return [
            f"Quality cannot be judged at {_listed([result.setting for result in blind])}: the model itself, in full "
            f"precision, predicts this text no better (perplexity {perplexity_text(worst.reference_nats)}) than the "
            f"frequencies of the text's own tokens do ({perplexity_text(worst.frequency_nats)}). If its weights are "
            "random, no text can judge it; otherwise use --text with text that it knows."
        ]

    def _too_few_tokens(self) -> list[str]:
        short = [check for check in self.checks if check.verdict == "too few tokens"]
        if not short:
            return []
        names = _listed(list(dict.fromkeys(check.name for check in short)))
        found = f"Too few tokens to decide: {names}. {self.tokens:,} were read"
        if any(check.tokens_needed is None for check in short):
            return [f"{found}; no text would be long enough for so small a limit."]
        most = max(check.tokens_needed or 0 for check in short)
        tokens = WINDOW_TOKENS * math.ceil(_SPARE * most / WINDOW_TOKENS)
        return [f"{found}, about {most:,} are needed: use --tokens {tokens} (and --text, if the text has not so many)."]

    def rows(self) -> list[Row]:
        """The table: each check once, at the setting with its worst value."""
        worst: dict[str, Check] = {}
        for check in self.checks:
            seen = worst.get(check.name)
            if seen is None or _badness(check) > _badness(seen):
                worst[check.name] = check
        return [
            Row(
                name=check.name,
                value=_shown(check.name, check.value),
                interval=""
                if check.interval is None
                else " to ".join(_shown(check.name, end) for end in check.interval),
                limit=_limit(check),
                verdict=check.verdict,
                reason=check.reason,
                setting=check.setting,
                detail=check.detail,
                tokens="" if check.tokens is None else f"{check.tokens:,}",
            )
            for check in worst.values()
        ]

    def budget_rows(self) -> list[BudgetRow]:
        """The second table: what each setting keeps and what it costs in quality."""
        return [_budget_row(result, self.tolerances.tokens_must_agree) for result in self.results]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; numbers that JSON does not have are null."""
        values: dict[str, Any] = _plain(self)
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "doubts": list(self.doubts),
            **values,
            "tolerances": _plain(self.tolerances),
            "checks": [_plain(check) for check in self.checks],
        }


def _badness(check: Check) -> tuple[int, float]:
    size = abs(check.value)
    # With a limit of 0, the value is a number of errors.
    return (_WORST_LAST.index(check.verdict), size / check.limit if check.limit else size)


def _limit(check: Check) -> str:
    if check.limit is None:
        return ""
    # Of all values, only a change can be below 0.
    return ("±" if "change" in check.name else "") + _shown(check.name, check.limit)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _budget_row(result: BudgetResult, must_agree: bool) -> BudgetRow:
    decisions = result.windows.decisions
    wrong = max((len(greedy.wrong) for greedy in result.greedy.values()), default=0)
    tokens = min((greedy.tokens for greedy in result.greedy.values()), default=0)
    differ = max((len(greedy.mismatches) for greedy in result.greedy.values()), default=0)
    return BudgetRow(
        setting=result.setting,
        kept="all" if result.kept_share is None else f"{result.kept_share:.3f}",
        reference_perplexity=perplexity_text(result.reference_nats),
        engine_perplexity=perplexity_text(result.engine_nats),
        decisions="nothing skips" if decisions is None else _differing(decisions.differ, decisions.total),
        quality=f"{result.perplexity_increase:+.2%}, KL {result.quality.divergence:.1e}, "
        f"{result.quality.top1:.1%} same",
        tokens=f"{tokens} equal"
        if not differ
        else f"{differ} of {tokens} differ" + (f", {wrong} wrong" if must_agree else ""),
    )


def _differing(differ: int, total: int) -> str:
    return f"{differ:,} of {total:,} differ" + (f", {differ / total:.2%}" if differ else "")


def _shown(name: str, value: float) -> str:
    """A value as text: shares in percent."""
    if math.isfinite(value) and any(word in name for word in ("share", "relative")):
        return f"{value:.2%}"
    return _number(value)


def _number(value: float) -> str:
    if value == int(value) if math.isfinite(value) else False:
        return f"{int(value)}"
    return f"{value:.2e}" if abs(value) < 0.01 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON's own types; NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
