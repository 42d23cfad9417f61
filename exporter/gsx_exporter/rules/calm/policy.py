"""`--policy calm:...` (CALM): a token exits where the model is confident, by a threshold or under a guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator, BeforeValidator

from gsx_engines.bundle.confidence import RANGES, Confidence, Guarantee, Measure, TestedThreshold, check_threshold
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import CalmPolicy, Policy, RuntimeInput
from gsx_engines.bundle.selection import Selection
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import EXIT_CLASSIFIER
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.calm.calibrate import GRIDS, PROMPT_TOKENS, calibrate_exits
from gsx_exporter.rules.calm.reference import Confident
from gsx_exporter.rules.calm.risk_control import Risk, RiskTarget
from gsx_exporter.rules.calm.traced import Calm
from gsx_exporter.rules.parameters import Parameters, bad_parameters, read_parameters
from gsx_exporter.rules.plan import (
    PolicyOptions,
    RulePlan,
    Settled,
    refuse_budget,
    refuse_kv_policy,
    refuse_none,
    refuse_rank,
    text_entry,
)
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import Curve, Setting, note_unused_budgets
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress

_FORM = "measure,name=value,..."
_EXAMPLE = "e.g. calm:softmax,tolerance=0.1,confidence=0.95 or calm:state,threshold=0.98"
DEFAULT_CONFIDENCE = 0.95
# Default number of new tokens over which a decaying threshold falls.
DEFAULT_DECAY_TOKENS = 256
# Thresholds of the softmax measure that `gsx compare` uses, from careful to bold.
_COMPARED = (0.9, 0.7, 0.5, 0.3, 0.1)


def _depths(text: object) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in str(text).split("+")}))
    except ValueError:
        raise ValueError("exits=4+8") from None


def _risk(text: object) -> object:
    if text not in ("agreement", "loss"):
        raise ValueError("risk=agreement or risk=loss")
    return text


def _decay(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError("decay=NUMBER of at least 0, tokens=COUNT of at least 1")
    return value


def _tokens(text: object) -> int:
    try:
        number = float(str(text))
    except ValueError:
        raise ValueError("tokens=NUMBER") from None
    if not 1 <= number < math.inf or number != int(number):
        raise ValueError("decay=NUMBER of at least 0, tokens=COUNT of at least 1")
    return int(number)


def _number(name: str) -> BeforeValidator:
    def read(text: object) -> float:
        try:
            return float(str(text))
        except ValueError:
            raise ValueError(f"{name}=NUMBER") from None

    return BeforeValidator(read)


class CalmOptions(Parameters):
    """CALM's parameters, as given.

    Args:
        measure: the measure of confidence.
        exits: numbers of layers after which tokens may exit; None for the checkpoint's exits.
        threshold: None to calibrate one under a guarantee.
        tolerance, confidence: the guarantee; None with a threshold.
        risk: what the guarantee is about.
        decay, tokens: tau and N of the decaying threshold; decay 0 for a constant threshold.
    """

    measure: Measure = "softmax"
    exits: Annotated[tuple[int, ...], BeforeValidator(_depths)] | None = None
    threshold: Annotated[float, _number("threshold")] | None = None
    tolerance: Annotated[float, _number("tolerance")] | None = None
    confidence: Annotated[float, _number("confidence")] | None = None
    risk: Annotated[Risk, BeforeValidator(_risk)] | None = None
    decay: Annotated[float, _number("decay"), AfterValidator(_decay)] = 0.0
    tokens: Annotated[int, BeforeValidator(_tokens)] = DEFAULT_DECAY_TOKENS

    @classmethod
    def leading_word(cls) -> str:
        """See `Parameters`."""
        return "measure"

    @property
    def guarantee(self) -> RiskTarget | None:
        """The guarantee that the calibrated threshold must meet; None if the threshold is given."""
        if self.tolerance is None:
            return None
        return RiskTarget(self.tolerance, DEFAULT_CONFIDENCE if self.confidence is None else self.confidence)


def read_calm(text: str) -> CalmOptions:
    """Read `measure,name=value,...`; exits are joined by +.

    Raises:
        UsageError: unknown or contradictory parameters.
    """
    given = read_parameters("calm", CalmOptions, text, _FORM, _EXAMPLE)
    if (given.threshold is None) == (given.tolerance is None):
        raise UsageError(
            "--policy calm needs a threshold or a guarantee",
            expected="one of threshold=T and tolerance=D",
            found="both" if given.threshold is not None else "neither",
            todo=_EXAMPLE,
        )
    if given.threshold is not None:
        if given.confidence is not None or given.risk is not None:
            bad_parameters("calm", "tolerance=D with them", "confidence and risk with a threshold", _EXAMPLE)
        check_threshold(given.threshold, *RANGES[given.measure])
    return given


@dataclass(frozen=True)
class CalmPlan(RulePlan):
    """A given threshold, or a guarantee under which one is calibrated on prompts of a text.

    Args:
        rule: measure, exits and decay.
        threshold: None to calibrate one.
        guarantee: that a calibrated threshold meets; None with a given one.
        risk: what the guarantee is about.
    """

    window: ClassVar[int] = PROMPT_TOKENS

    rule: Calm = field(kw_only=True)
    threshold: float | None = field(kw_only=True)
    guarantee: RiskTarget | None = field(kw_only=True)
    risk: Risk = field(kw_only=True)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`. Raises: UsageError: too few prompts, or nothing can be skipped under the guarantee."""
        rule = self.rule
        threshold, guarantee, entry = self.threshold, None, None
        if self.guarantee is not None:
            assert text is not None
            threshold, guarantee = _guaranteed(self, self.guarantee, checkpoint, text, on_progress)
            entry = text_entry(text)
        assert threshold is not None
        least, most = RANGES[rule.measure]
        policy = CalmPolicy(
            branches=BRANCHES,
            inputs=(
                RuntimeInput(name="exit_threshold", least=least, most=most),
                RuntimeInput(name="full_until", least=0, most=None, default=0),
            ),
            # A decaying threshold counts new tokens, so the prompt runs in full; otherwise prompt tokens may exit too.
            warm_up=0 if rule.decay else None,
            exits=rule.exits,
            confidence=Confidence(
                measure=rule.measure,
                threshold=threshold,
                decay=rule.decay,
                decay_tokens=rule.decay_tokens,
                guarantee=guarantee,
            ),
            calibration=entry,
        )
        return Settled(rule, policy)


def plan_calm(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `calm`.

    Raises:
        UsageError: as for `read_calm`; exits that the model does not have; options that the policy excludes.
    """
    refuse_budget("calm", options, "the exit threshold sets how much is kept: calm:threshold=T, or calm:tolerance=D")
    refuse_rank("calm", options)
    kv_policy = options.kv_policy or ("copy" if config.shares_caches else "compute")
    refuse_kv_policy("calm", kv_policy, config)
    refuse_none(kv_policy, "compute (K and V of the layers above, from the exit state) or copy with calm")
    given = read_calm(parameters)
    return CalmPlan(
        "calm",
        BRANCHES,
        kv_policy,
        calibrates=given.guarantee is not None,
        rule=Calm(_exits(given.exits, config, given.measure), given.measure, given.decay, given.tokens),
        threshold=given.threshold,
        guarantee=given.guarantee,
        risk=given.risk or "agreement",
    )


def _guaranteed(
    plan: CalmPlan, guarantee: RiskTarget, checkpoint: Checkpoint, text: TokenText, on_progress: OnProgress
) -> tuple[float, Guarantee]:
    """The boldest threshold that meets a guarantee, and the manifest's record of the test."""
    found = calibrate_exits(
        checkpoint,
        text.ids,
        DecoderOptions(plan.rule, plan.kv_policy),
        guarantee,
        plan.risk,
        GRIDS[plan.rule.measure],
        on_progress,
    )
    outcome = found.outcome
    if outcome.threshold is None:
        first = outcome.tested[0]
        raise UsageError(
            "nothing can be skipped under this guarantee",
            expected=f"a mean {plan.risk} risk of at most {guarantee.tolerance:g} "
            f"with confidence {guarantee.confidence:g} at some threshold",
            found=f"{first.mean_risk:.3g} on {outcome.prompts} prompts (p-value {first.p_value:.2g}) "
            f"at the most careful threshold, {first.threshold:g}",
            todo="give a larger tolerance, a lower confidence, more text, or a model trained with exits",
        )
    return outcome.threshold, Guarantee(
        risk=plan.risk,
        tolerance=guarantee.tolerance,
        confidence=guarantee.confidence,
        prompts=outcome.prompts,
        prompt_tokens=text.ids.shape[1],
        tested=tuple(
            TestedThreshold(
                threshold=one.threshold,
                mean_risk=one.mean_risk,
                p_value=one.p_value,
                accepted=one.accepted,
                kept_share=kept,
            )
            for one, kept in zip(outcome.tested, found.kept, strict=True)
        ),
    )


def _exits(given: tuple[int, ...] | None, config: ModelConfig, measure: Measure) -> tuple[int, ...]:
    """The exits: those given, or the checkpoint's, below the model's depth."""
    if measure == "gate" and not config.loop_gate:
        raise UsageError(
            "--policy calm:gate needs a looped model with an exit gate",
            expected="an Ouro checkpoint",
            found=config.family,
            todo="use another measure: softmax, state",
        )
    inside = range(1, config.num_layers)
    trained = config.exit_classifiers
    if given is None and measure == "classifier" and trained:
        return trained
    exits = given
    loops = config.loops
    if loops is not None:
        if exits is not None and not set(exits) <= set(loops.ends):
            raise UsageError(
                "--policy calm: a looped model has exits between its loops only",
                expected=", ".join(map(str, loops.ends)) or "a model with several loops",
                found=", ".join(map(str, exits)),
            )
        exits = exits or loops.ends
    if exits is None:
        exits = tuple(sorted({depth for depth in config.exits if depth in inside}))
        if not exits:
            raise UsageError(
                "--policy calm needs exits, and this checkpoint lists none",
                expected='"exits": [E, ...] in the "gsx" section of config.json, as gsx train writes it',
                found="no exit below the last layer",
                todo="train exits (gsx train), or give depths to try: calm:exits=4+8",
            )
    if not all(depth in inside for depth in exits):
        raise UsageError(
            "--policy calm: its exits are outside the model",
            expected=f"depths from 1 to {config.num_layers - 1}",
            found=", ".join(map(str, exits)),
        )
    untrained = [depth for depth in exits if depth not in trained]
    if measure == "classifier" and untrained:
        names = ", ".join(f"model.layers.{depth - 1}.{EXIT_CLASSIFIER}" for depth in untrained)
        raise UsageError(
            "--policy calm:classifier: the checkpoint lacks classifiers for these exits",
            expected=f'"exit_classifiers" in the "gsx" section of config.json, and weight and bias of {names}',
            found=f"classifiers after {', '.join(map(str, trained))} layers" if trained else "no classifiers",
            todo=f"train them: gsx train --model MODEL --exit-classifiers {','.join(map(str, exits))} -o DIR; "
            "or use another measure: softmax, state",
        )
    return exits


def _traced(recorded: Recorded) -> Calm:
    found = recorded.policy.confidence
    assert found is not None
    return Calm(recorded.policy.exits, found.measure, found.decay, found.decay_tokens)


def _reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> ReferenceRule:
    found = policy.confidence
    assert found is not None
    return Confident(
        policy.exits, found.measure, controls["exit_threshold"], controls["full_until"], found.decay, found.decay_tokens
    )


def _settings(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """No exits, the exported threshold, 0.5, and the lowest, with which every token exits as early as it may."""
    note_unused_budgets(asked, notes)
    assert manifest.policy is not None
    confidence = manifest.policy.confidence
    assert confidence is not None
    wanted = {math.inf: "no exits", confidence.threshold: "as exported"}
    for threshold in (0.5, RANGES[confidence.measure].least):
        wanted.setdefault(threshold, f"threshold {threshold:g}")
    # What a threshold keeps is not known in advance, only that a lower one keeps less: the shares are for sorting.
    return [
        Setting(KeepSettings(exit_threshold=threshold), name, share)
        for (threshold, name), share in zip(
            sorted(wanted.items(), reverse=True), np.linspace(1, 0, len(wanted)), strict=True
        )
    ]


def _exported_share(manifest: Manifest) -> float:
    assert manifest.policy is not None
    assert manifest.policy.confidence is not None
    threshold = manifest.policy.confidence.threshold
    return next(one.share for one in _settings(manifest, None, []) if one.keep.exit_threshold == threshold)


def _thresholds(manifest: Manifest) -> Curve:
    return {f"threshold {one:g}": KeepSettings(exit_threshold=one) for one in _COMPARED}


CALM = Rule(
    name="calm",
    plan=plan_calm,
    traced=_traced,
    reference=_reference,
    settings=_settings,
    exported_share=_exported_share,
    # Requests give their own threshold; any exported one will do, and a given one needs no calibration.
    compared={"calm:threshold=0.5": {"calm": _thresholds}},
)
