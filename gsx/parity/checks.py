"""Turns the measurements of one setting into checks: a value, a limit with its reason, a verdict.

Limits come from `tolerances.py` and `quality.py`. A value without a limit is only reported. Values that are means over
tokens pass only if there were enough of them, and only on a text that the model can predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gsx.parity.closeness import Compared, Routing
from gsx.parity.difference import Comparison
from gsx.parity.estimate import Estimate
from gsx.parity.greedy import Greedy
from gsx.parity.quality import QualityLimits
from gsx.parity.result import BudgetResult, perplexity_text
from gsx.parity.speculation import SpeculationResult
from gsx.parity.tolerances import P_LEAST, TAIL, Tolerances

# "too few tokens" and "not judged" are neither: the limit is not known to hold.
Verdict = Literal["pass", "fail", "reported", "too few tokens", "not judged"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked at one setting of the keep rule.

    Args:
        name: what was checked, the same at every setting.
        setting: the setting's name.
        value: the statistic; limit: its largest allowed value, in either direction, None if it is only reported.
        detail: further numbers, in words; reason: why the limit is what it is.
        interval: of a mean over tokens, the ends of its 95 % confidence interval.
        tokens_needed: about how many would decide, where there were too few; None also where no text would.
        tokens: how many were read for it; None where tokens are not what counts.
    """

    name: str
    setting: str
    value: float
    limit: float | None
    verdict: Verdict
    detail: str
    reason: str
    interval: tuple[float, float] | None = None
    tokens_needed: int | None = None
    tokens: int | None = None


def checks_of(result: BudgetResult, limits: Tolerances, quality: QualityLimits) -> tuple[Check, ...]:
    """Every check at one setting."""
    checks = _Checks(result.setting, limits, result.rounding)
    read = result.tokens
    checks.quality(result, quality)
    checks.compared("", result.windows, read.windows, read.compared)
    difference = abs(result.engine_nats - result.reference_nats)
    decisions, routing = result.windows.decisions, result.windows.routing
    left_out = any(one is not None and one.tokens_left_out > 0 for one in (decisions, routing))
    checks.add(
        "perplexity, nats per token",
        difference,
        # A flipped decision rightly changes the loss of later tokens; whether it may flip is another check.
        None if left_out else limits.nats,
        detail=f"{perplexity_text(result.reference_nats)} and {perplexity_text(result.engine_nats)}",
        reason="a loss changes by at most twice the error of its logits",
        tokens=result.scored_tokens,
    )
    if result.rounding is not None:
        own = result.rounding.logits
        checks.add(
            "PyTorch's own float32: logits, largest error",
            own.max_abs,
            None,
            detail=f"{own.worst}",
            reason=f"limits of logits and states are never below {TAIL} times PyTorch's own error",
            tokens=read.rounded,
        )
    for name, compared, tokens in (
        ("cache, single steps", result.single_steps, read.cached),
        ("cache, one chunk", result.one_chunk, read.cached),
        ("left padding", result.padded, read.padded),
    ):
        if compared is not None:
            checks.compared(name + ": ", compared, tokens, tokens)
    if result.fast_logits is not None:
        _fast(checks, result, result.fast_logits)
    for runner, greedy in result.greedy.items():
        checks.greedy(f"greedy tokens, {runner} runner", greedy)
    if result.speculation is not None:
        checks.speculation(result.speculation)
    return tuple(checks.made)


def _fast(checks: _Checks, result: BudgetResult, fast: Comparison) -> None:
    """Checks of the runner that generates."""
    limits, decisions, read = checks.limits, result.windows.decisions, result.tokens
    if limits.runners is None:
        limit = limits.logit_limit(fast.reference_max, result.rounding)
        checks.numbers("fast runner: logits", fast, fast.max_abs, limit, read.compared)
    else:
        checks.numbers(
            "fast runner: logits, off the portable runner's",
            fast,
            fast.rms / fast.reference_rms,
            limits.runners if math.isfinite(limits.runners) else None,
            read.compared,
        )
    if decisions is not None and limits.differing_share is None:
        checks.add(
            "fast runner: branches with wrong counts",
            result.fast_wrong_counts,
            0,
            detail="rows kept by each branch in each window",
            reason="it must skip what the reference skips",
            tokens=read.compared,
        )


def wrong_default(differs: bool) -> Check:
    """The check of the graph's default run-time inputs, which apply when a client gives none."""
    return Check(
        "default selection, wrong",
        "as exported",
        float(differs),
        0,
        "fail" if differs else "pass",
        detail="the graph's default run-time inputs, and the manifest's",
        reason="a client that gives no run-time inputs must get the exported ones",
    )


class _Checks:
    """Turns measurements of one setting into checks."""

    def __init__(self, setting: str, limits: Tolerances, rounding: Compared | None) -> None:
        self.setting, self.limits, self.rounding = setting, limits, rounding
        self.made: list[Check] = []

    def add(
        self, name: str, value: float, limit: float | None, *, detail: str, reason: str, tokens: int | None = None
    ) -> None:
        verdict: Verdict = "reported" if limit is None else "pass" if value <= limit else "fail"
        self.made.append(Check(name, self.setting, value, limit, verdict, detail, reason, tokens=tokens))

    def numbers(
        self, name: str, found: Comparison, value: float, limit: float | None, tokens: int | None = None
    ) -> None:
        """A numeric check. It fails on NaN or if nothing was compared, even without a limit."""
        if not found.usable:
            value, limit = math.inf, limit or 0.0
        if found.values == 0:
            detail = "nothing was compared"
        elif found.not_finite:
            detail = f"{found.not_finite} values are not numbers"
        else:
            detail = f"{found.worst}"
        self.add(name, value, limit, detail=detail, reason=self.limits.reason, tokens=tokens)

    def compared(self, prefix: str, found: Compared, tokens: int, state_tokens: int) -> None:
        """Args: tokens: read for logits and decisions; state_tokens: for states, K and V."""
        limits = self.limits
        logits = found.logits
        limit = limits.logit_limit(logits.reference_max, self.rounding)
        self.numbers(prefix + "logits, largest error", logits, logits.max_abs, limit, tokens)
        if prefix:
            groups = {"states, K and V": (*found.states, *found.keys, *found.values)}
        else:
            groups = {"states": found.states, "keys": found.keys, "values": found.values}
        for name, layers in groups.items():
            worst = _worst_layer(layers)
            limit = limits.relative_limit(self.rounding)
            self.numbers(f"{prefix}{name}, error over scale", worst, worst.max_relative, limit, state_tokens)
        if found.routing is not None:
            self.routing(prefix, found.routing, tokens)
        if found.decisions is None:
            return
        decisions = found.decisions
        detail = f"of {decisions.total:,}; {decisions.near_ties} near ties"
        if decisions.flips:
            detail += (
                f"; {len(decisions.flips)} flipped, first {decisions.flips[0].place} at "
                f"{decisions.flips[0].margin:.1e} from its threshold; {decisions.tokens_left_out} of "
                f"{decisions.tokens} tokens saw a flip and are left out"
            )
        if limits.differing_share is None:
            reason = (
                f"float32 scores on both sides: only a decision within {limits.near_tie:g} of its threshold may flip"
            )
            wrong = len(decisions.wrong)
            self.add(prefix + "decisions, wrong", wrong, 0, detail=detail, reason=reason, tokens=tokens)
        elif limits.runners is None:
            reason = "scores are compared in float32, but come from rounded states: few decisions may flip"
            self.add(
                prefix + "decisions, share that differs",
                decisions.differing_share,
                limits.differing_share,
                detail=detail,
                reason=reason,
                tokens=tokens,
            )

    def routing(self, prefix: str, found: Routing, tokens: int) -> None:
        """Tokens that went to other experts: only where two were nearly equal, if the precision has limits at all."""
        detail = f"of {found.total:,}; {found.differ} differ"
        relative = self.limits.relative
        if found.flips:
            first = found.flips[0]
            detail += f", first {first.place}, where two were {first.margin:.1e} of the logits' size apart"
            if relative is not None:
                detail += f"; {found.tokens_left_out} of {found.tokens} tokens saw a difference and are left out"
        if relative is None:
            self.add(prefix + "experts, share that differs", found.differ / found.total, None, detail=detail,
                     reason=self.limits.reason, tokens=tokens)  # fmt: skip
        else:
            reason = f"a router may choose another expert only if its logits are within {relative:g} of their size"
            self.add(prefix + "experts, wrong", len(found.wrong), 0, detail=detail, reason=reason, tokens=tokens)

    def quality(self, result: BudgetResult, limits: QualityLimits) -> None:
        """The quality that the arithmetic costs; only reported without a limit."""
        found, estimates = result.quality, result.quality.estimates
        over = f"over {result.scored_tokens} tokens"
        perplexities = f"{perplexity_text(result.reference_nats)} and {perplexity_text(result.engine_nats)}"
        differing = None if limits.top1 is None else 1 - limits.top1
        divergence = "next-token distribution, KL divergence in nats"
        rows = [
            ("perplexity, relative change", estimates.perplexity, limits.perplexity_increase, perplexities),
            (divergence, estimates.divergence, limits.divergence, over),
            ("next token, share that differs", estimates.differing, differing, over),
        ]
        if estimates.fast_divergence is not None:
            rows.insert(2, (f"fast runner: {divergence}", estimates.fast_divergence, limits.divergence, over))
        if estimates.flipped is not None:
            layer, branch, share = found.most_flipped
            most = f"most in layer {layer}, {branch}: {share:.2%}"
            rows.append(("decisions, share that flipped", estimates.flipped, limits.flipped, most))
        for name, estimate, limit, detail in rows:
            self.estimated(name, estimate, limit, detail, judgeable=result.judgeable, part=result.part)

    def estimated(
        self, name: str, found: Estimate, limit: float | None, detail: str, *, judgeable: bool, part: bool
    ) -> None:
        """A mean over tokens. Too large a value fails; one within the limit passes only if its interval decides and
        the model can predict the text. A bundle whose numbers have limits too does not depend on such a judge.

        Where only a part of the text was read, to find faults and not to judge, what it cannot decide is reported, and
        a value fails if its whole interval is beyond the limit.
        """
        needed = None
        verdict: Verdict
        if limit is None:
            verdict = "reported"
        elif part:
            verdict = (
                "fail" if not found.nearest <= limit else "pass" if found.decides(limit) and judgeable else "reported"
            )
        elif not abs(found.value) <= limit:
            verdict = "fail"
        elif not judgeable:
            verdict = "not judged" if self.limits.logits is None else "reported"
            detail += "; the model itself cannot predict this text"
        elif found.decides(limit):
            verdict = "pass"
        else:
            verdict, needed = "too few tokens", found.tokens_needed(limit)
            detail += f"; about {needed:,} tokens would decide" if needed else "; too small a limit for any text"
        self.made.append(
            Check(
                name,
                self.setting,
                found.value,
                limit,
                verdict,
                detail,
                reason="against full precision; the 95 % interval must be within the limit, or narrower than it",
                interval=(found.low, found.high),
                tokens_needed=needed,
                tokens=found.tokens,
            )
        )

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
            self.add(name, wrong, 0, detail=detail, reason=reason, tokens=found.tokens)
        else:
            wrong = len(found.mismatches)
            self.add(name, wrong, None, detail=detail, reason=self.limits.reason, tokens=found.tokens)

    def speculation(self, found: SpeculationResult) -> None:
        """A draft must change only the speed."""
        reference_max = 0.0
        for name, logits in found.logits.items():
            reference_max = max(reference_max, logits.reference_max)
            limit = self.limits.logit_limit(logits.reference_max, self.rounding)
            self.numbers(f"{name}: logits", logits, logits.max_abs, limit)
        # Two runs of one quantized engine differ as its two runners do.
        near = self.limits.logit_limit(reference_max, self.rounding) or (self.limits.runners or 0.0) * reference_max
        for name, texts in (("greedy", found.greedy), ("sampled", found.sampled)):
            wrong = [mismatch for mismatch in texts.mismatches if mismatch.lead > near]
            detail = f"{texts.continuations} continuations, {texts.tokens:,} tokens, draft {found.draft}"
            if found.acceptance is not None and name == "greedy":
                detail += f", {found.acceptance:.0%} of drafted tokens accepted"
            if texts.mismatches:
                first = texts.mismatches[0]
                detail += (
                    f"; {len(texts.mismatches)} differ, the first at token {first.position} of prompt {first.prompt}, "
                    f"{first.plain_token} and {first.speculative_token} are {first.lead:.1e} apart"
                )
            self.add(
                f"speculative {name} text, continuations that differ",
                float(len(wrong)),
                0,
                detail=detail,
                reason="the model's own picks decide; only if logits are nearer than their limit may either token win",
                tokens=texts.tokens,
            )
        if found.sampling is not None:
            fit = found.sampling
            self.add(
                "sampling, 1 - p against the reference's probabilities",
                1 - fit.least_p,
                1 - P_LEAST,
                detail=f"chi-square at {fit.places} positions, {fit.draws} seeded draws at each, p {fit.least_p:.2g}"
                + (f"; {fit.outside} draws of tokens that the reference excludes" if fit.outside else ""),
                reason=f"a correct sampler falls below {P_LEAST:g} once in a million runs, and the seeds are fixed",
            )


def _worst_layer(layers: Sequence[Comparison]) -> Comparison:
    """The layer with the largest error; a layer that cannot be used comes before all others."""
    return max(layers, key=lambda layer: (not layer.usable, layer.max_relative))
