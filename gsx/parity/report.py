"""The parity report: what was measured, which checks must hold and why, and the verdict.

Every check has a limit with a reason (`tolerances.py`). What has none is reported only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gsx.parity.compare import Compared, Comparison
from gsx.parity.measure import Greedy
from gsx.parity.quality import Quality, QualityLimits
from gsx.parity.speculation import SpeculationResult
from gsx.parity.tolerances import P_LEAST, TAIL, TOLERANCES, Tolerances

Verdict = Literal["pass", "fail", "reported"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, at one setting of the keep rule.

    Args:
        name: what, the same at every setting.
        setting: its name.
        value: the statistic; limit: what it may be at most, None where it is reported only.
        detail: numbers beside it, in words; reason: why the limit is what it is.
    """

    name: str
    setting: str
    value: float
    limit: float | None
    verdict: Verdict
    detail: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A line of the table: a check at the setting where it came out worst. All are words but the verdict."""

    name: str
    value: str
    limit: str
    verdict: Verdict
    reason: str
    setting: str
    detail: str


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


@dataclass(frozen=True)
class KeepMap:
    """Which tokens of the beginning of a text keep which layer: keep[layer][attn, mlp][token]."""

    setting: str
    tokens: tuple[str, ...]
    keep: tuple[tuple[tuple[bool, ...], tuple[bool, ...]], ...]


@dataclass(frozen=True)
class Similarity:
    """How alike a token's state is before and after each FFN (FFN-SkipLLM), nothing being skipped.

    Args:
        mean: [L] cosine, mean over the calibration text.
        first, last: the layers that may skip.
        threshold: cosine from which the next FFNs are skipped at the exported budget; None where none are.
    """

    mean: tuple[float, ...]
    first: int
    last: int
    threshold: float | None


@dataclass(frozen=True)
class Report:
    """What `gsx verify` found.

    Args:
        bundle: its directory's name; model: the reference, as it was asked for.
        precision, quantization, kv_cache, policy, select, exported_budget, kv_policy: of the bundle; quantization and
            kv_cache are None in full precision, policy for a dense model, select where the rule has no thresholds. The
            exported budget of a set of layers is its share.
        quality_limits: hold at budgets from 1 down to the exported one.
        reference_precision: of the reference's weights and activations.
        branches: those that the keep rule may skip.
        text: name of the text; text_sha256: its hash; tokens: how many were read.
        results: one a budget, in falling order.
        default_is_exported: whether the graph's own default selection is the exported one; None for a dense model.
        notes: what was left out and why.
        similarity: with FFN-SkipLLM.
        tools: versions.
    """

    bundle: str
    model: str
    weights_sha256: str
    family: str
    precision: str
    quantization: str | None
    kv_cache: str | None
    quality_limits: QualityLimits
    reference_precision: str
    policy: str | None
    select: str | None
    exported_budget: float
    kv_policy: str
    branches: tuple[str, ...]
    text: str
    text_sha256: str
    tokens: int
    results: tuple[BudgetResult, ...]
    default_is_exported: bool | None
    notes: tuple[str, ...]
    keep_map: KeepMap | None
    similarity: Similarity | None
    tools: Mapping[str, str]
    seconds: float

    @property
    def rounds(self) -> bool:
        """Whether something is in 8 bits."""
        return self.quantization is not None or self.kv_cache is not None

    @property
    def tolerances(self) -> Tolerances:
        """Limits of the bundle's precision."""
        return TOLERANCES["quantized" if self.rounds else self.precision]

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every check at every budget."""
        checks = [
            check for result in self.results for check in _checks(result, self.tolerances, self._quality_limits(result))
        ]
        if self.default_is_exported is not None:
            once = _Checks("as exported", self.tolerances, None)
            once.add(
                "default selection, wrong",
                float(not self.default_is_exported),
                0,
                detail="the graph's own run-time inputs, and the manifest's",
                reason="a client that gives none must get the exported ones",
            )
            checks += once.made
        return tuple(checks)

    def _quality_limits(self, result: BudgetResult) -> QualityLimits:
        """Limits at a budget: below the exported one, which the bundle was not made for, quality is reported only."""
        return self.quality_limits if result.budget >= self.exported_budget else QualityLimits()

    @property
    def passed(self) -> bool:
        """Whether every check that has a limit holds, and there was something to check."""
        verdicts = [check.verdict for check in self.checks]
        return "fail" not in verdicts and "pass" in verdicts

    def rows(self) -> list[Row]:
        """The table: each check once, at the setting where it came out worst."""
        worst: dict[str, Check] = {}
        for check in self.checks:
            seen = worst.get(check.name)
            if seen is None or _badness(check) > _badness(seen):
                worst[check.name] = check
        return [
            Row(
                name=check.name,
                value=_number(check.value),
                limit="" if check.limit is None else _number(check.limit),
                verdict=check.verdict,
                reason=check.reason,
                setting=check.setting,
                detail=check.detail,
            )
            for check in worst.values()
        ]

    def budget_rows(self) -> list[BudgetRow]:
        """The second table: what each setting keeps and what it costs in quality."""
        return [_budget_row(result) for result in self.results]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; numbers that JSON lacks are null."""
        values: dict[str, Any] = _plain(self)
        return {
            "passed": self.passed,
            **values,
            "tolerances": _plain(self.tolerances),
            "checks": [_plain(check) for check in self.checks],
        }


def _checks(result: BudgetResult, limits: Tolerances, quality: QualityLimits) -> list[Check]:
    checks = _Checks(result.setting, limits, result.rounding)
    checks.quality(result, quality)
    checks.compared("", result.windows)
    difference = abs(result.engine_nats - result.reference_nats)
    decisions = result.windows.decisions
    left_out = decisions is not None and decisions.tokens_left_out > 0
    checks.add(
        "perplexity, nats per token",
        difference,
        # A decision that turned changes the loss of what follows it, by right; whether it may turn is another check.
        None if left_out else limits.nats,
        detail=f"{math.exp(result.reference_nats):.4f} and {math.exp(result.engine_nats):.4f}",
        reason="a loss moves by at most twice the error of its logits",
    )
    if result.rounding is not None:
        own = result.rounding.logits
        checks.add(
            "PyTorch's own float32: logits, largest error",
            own.max_abs,
            None,
            detail=f"{own.worst}",
            reason=f"limits of logits and states are never below {TAIL} times what PyTorch itself loses",
        )
    for name, compared in (
        ("cache, single steps", result.single_steps),
        ("cache, one chunk", result.one_chunk),
        ("left padding", result.padded),
    ):
        if compared is not None:
            checks.compared(name + ": ", compared)
    fast = result.fast_logits
    if limits.runners is None:
        checks.numbers(
            "fast runner: logits", fast, fast.max_abs, limits.logit_limit(fast.reference_max, result.rounding)
        )
    else:
        checks.numbers(
            "fast runner: logits, off the portable runner's", fast, fast.rms / fast.reference_rms, limits.runners
        )
    if decisions is not None and limits.differing_share is None:
        checks.add(
            "fast runner: branches with wrong counts",
            result.fast_wrong_counts,
            0,
            detail="rows kept by each branch in each window",
            reason="it must skip what the reference skips",
        )
    for runner, greedy in result.greedy.items():
        checks.greedy(f"greedy tokens, {runner} runner", greedy)
    if result.speculation is not None:
        checks.speculation(result.speculation)
    return checks.made


class _Checks:
    """Turns measurements of one setting into checks."""

    def __init__(self, setting: str, limits: Tolerances, rounding: Compared | None) -> None:
        self.setting, self.limits, self.rounding = setting, limits, rounding
        self.made: list[Check] = []

    def add(self, name: str, value: float, limit: float | None, *, detail: str, reason: str) -> None:
        verdict: Verdict = "reported" if limit is None else "pass" if value <= limit else "fail"
        self.made.append(Check(name, self.setting, value, limit, verdict, detail, reason))

    def numbers(self, name: str, found: Comparison, value: float, limit: float | None) -> None:
        """A numeric check; NaN, and nothing to compare, fail, also where there is no limit."""
        if not found.usable:
            value, limit = math.inf, limit or 0.0
        if found.values == 0:
            detail = "nothing was compared"
        elif found.not_finite:
            detail = f"{found.not_finite} values are not numbers"
        else:
            detail = f"{found.worst}"
        self.add(name, value, limit, detail=detail, reason=self.limits.reason)

    def compared(self, prefix: str, found: Compared) -> None:
        limits = self.limits
        logits = found.logits
        limit = limits.logit_limit(logits.reference_max, self.rounding)
        self.numbers(prefix + "logits, largest error", logits, logits.max_abs, limit)
        if prefix:
            groups = {"states, K and V": (*found.states, *found.keys, *found.values)}
        else:
            groups = {"states": found.states, "keys": found.keys, "values": found.values}
        for name, layers in groups.items():
            worst = _worst_layer(layers)
            self.numbers(
                f"{prefix}{name}, error over scale", worst, worst.max_relative, limits.relative_limit(self.rounding)
            )
        if found.decisions is None:
            return
        one = found.decisions
        detail = f"of {one.total:,}; {one.near_ties} near ties"
        if one.flips:
            detail += (
                f"; {len(one.flips)} turned, first {one.flips[0].place} at {one.flips[0].margin:.1e} "
                f"from its threshold; {one.tokens_left_out} of {one.tokens} tokens saw one and are left out"
            )
        if limits.differing_share is None:
            reason = f"float32 scores on both sides: only one within {limits.near_tie:g} of its threshold may turn"
            self.add(prefix + "decisions, wrong", len(one.wrong), 0, detail=detail, reason=reason)
        elif limits.runners is None:
            reason = "scores are compared in float32, but of rounded states: few may turn"
            self.add(
                prefix + "decisions, share that differs",
                one.differing_share,
                limits.differing_share,
                detail=detail,
                reason=reason,
            )

    def quality(self, result: BudgetResult, limits: QualityLimits) -> None:
        """What the arithmetic costs; reported only where there is no limit."""
        found = result.quality
        rows = [
            ("perplexity, relative increase", result.perplexity_increase, limits.perplexity_increase),
            ("next-token distribution, KL divergence in nats", found.divergence, limits.divergence),
            ("next token, share that differs", 1 - found.top1, None if limits.top1 is None else 1 - limits.top1),
        ]
        if found.flipped_share is not None:
            rows.append(("decisions, share that flipped", found.flipped_share, limits.flipped))
        for name, value, limit in rows:
            detail = f"{math.exp(result.reference_nats):.4f} and {math.exp(result.engine_nats):.4f}"
            if name.startswith("decisions"):
                layer, branch, share = found.most_flipped
                detail = f"most in layer {layer}, {branch}: {share:.2%}"
            elif not name.startswith("perplexity"):
                detail = f"over {result.scored_tokens} tokens"
            self.add(name, value, limit, detail=detail, reason="the quality that was asked for, against full precision")

    def greedy(self, name: str, found: Greedy) -> None:
        detail = f"of {found.tokens}"
        if found.mismatches:
            first = found.mismatches[0]
            detail += (
                f"; {len(found.mismatches)} differ, first token {first.position}: "
                f"{first.reference_token} became {first.engine_token}, the best two {first.margin:.1e} apart"
            )
            detail += f" ({first.excused})" if first.excused else ""
        if found.flips:
            detail += f"; {found.flips} decisions differ"
        if self.limits.tokens_must_agree:
            wrong = len(found.wrong) + found.wrong_flips
            if found.tokens == 0:
                wrong, detail = 1, "nothing was compared"
            reason = "the same tokens, unless the reference's two best are nearer than the logits' limit"
            self.add(name, wrong, 0, detail=detail, reason=reason)
        else:
            self.add(name, len(found.mismatches), None, detail=detail, reason=self.limits.reason)

    def speculation(self, found: SpeculationResult) -> None:
        """A draft must change the speed and nothing else."""
        reference_max = 0.0
        for name, logits in found.logits.items():
            reference_max = max(reference_max, logits.reference_max)
            limit = self.limits.logit_limit(logits.reference_max, self.rounding)
            self.numbers(f"{name}: logits", logits, logits.max_abs, limit)
        # Two runs of one quantized engine differ as its two runners do.
        near = self.limits.logit_limit(reference_max, self.rounding) or (self.limits.runners or 0.0) * reference_max
        for name, texts in (("greedy", found.greedy), ("sampled", found.sampled)):
            wrong = [one for one in texts.mismatches if one.lead > near]
            detail = f"{texts.continuations} continuations, {texts.tokens:,} tokens, draft {found.draft}"
            if found.acceptance is not None and name == "greedy":
                detail += f", {found.acceptance:.0%} of drafted tokens right"
            if texts.mismatches:
                first = texts.mismatches[0]
                detail += (
                    f"; {len(texts.mismatches)} part, the first at token {first.position} of prompt {first.prompt}, "
                    f"{first.plain_token} and {first.speculative_token} being {first.lead:.1e} apart"
                )
            self.add(
                f"speculative {name} text, continuations that differ",
                float(len(wrong)),
                0,
                detail=detail,
                reason="the model's own picks decide; only logits nearer than their limit may come out either way",
            )
        if found.sampling is not None:
            fit = found.sampling
            self.add(
                "sampling, 1 - p against the reference's probabilities",
                1 - fit.least_p,
                1 - P_LEAST,
                detail=f"chi-square at {fit.places} places, {fit.draws} seeded draws at each, p {fit.least_p:.2g}"
                + (f"; {fit.outside} draws of tokens that the reference leaves out" if fit.outside else ""),
                reason=f"a true sampler falls below {P_LEAST:g} once in a million runs, and the seeds are fixed",
            )


def _worst_layer(layers: Sequence[Comparison]) -> Comparison:
    """The layer that is furthest off; one that cannot be used before all others."""
    return max(layers, key=lambda one: (not one.usable, one.max_relative))


def _badness(check: Check) -> tuple[bool, float]:
    if check.limit is None:
        return (False, check.value)
    # A limit of 0 counts faults.
    return (check.verdict == "fail", check.value / check.limit if check.limit else check.value)


def _budget_row(result: BudgetResult) -> BudgetRow:
    decisions = result.windows.decisions
    wrong = sum(len(one.wrong) for one in result.greedy.values())
    tokens = min((one.tokens for one in result.greedy.values()), default=0)
    differ = max((len(one.mismatches) for one in result.greedy.values()), default=0)
    return BudgetRow(
        setting=result.setting,
        kept="all" if result.kept_share is None else f"{result.kept_share:.3f}",
        reference_perplexity=f"{math.exp(result.reference_nats):.4f}",
        engine_perplexity=f"{math.exp(result.engine_nats):.4f}",
        decisions="nothing skips" if decisions is None else f"{decisions.differ} of {decisions.total:,} differ",
        quality=f"{result.perplexity_increase:+.2%}, KL {result.quality.divergence:.1e}, "
        f"{result.quality.top1:.1%} same",
        tokens=f"{tokens} equal" if not differ else f"{differ} of {tokens} differ, {wrong} wrong",
    )


def _number(value: float) -> str:
    if value == int(value) if math.isfinite(value) else False:
        return f"{int(value)}"
    return f"{value:.2e}" if abs(value) < 0.01 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON's own types; NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
