"""`--policy calm:...` (CALM): a token leaves where the model is sure of it, by a threshold or under a guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NoReturn, get_args

from gsx.policies.base import Choice, OnProgress, Plan, Sections, refuse_budget, refuse_none, refuse_rank, text_entry
from gsx_engines.bundle.confidence import MEASURES, RANGES, Measure, check_threshold
from gsx_engines.bundle.policy import Confidence, Policy, RuntimeInput, TestedThreshold
from gsx_engines.bundle.policy import Guarantee as GuaranteeSection
from gsx_exporter.checkpoint import EXIT_CLASSIFIER, Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.exit_calibration import GRIDS, PROMPT_TOKENS, calibrate_exits
from gsx_exporter.risk_control import Guarantee, Risk
from gsx_exporter.rules.calm import Calm
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import Progress

_EXAMPLE = "e.g. calm:softmax,tolerance=0.1,confidence=0.95 or calm:state,threshold=0.98"
DEFAULT_CONFIDENCE = 0.95
# New tokens over which a decaying threshold falls, if not given.
DEFAULT_DECAY_TOKENS = 256


@dataclass(frozen=True)
class CalmOptions:
    """What CALM is given.

    Args:
        exits: depths to ask at.
        measure: of confidence.
        threshold: None to find one under the guarantee.
        guarantee: None with a threshold.
        risk: what the guarantee is about.
        decay, decay_tokens: tau and N of the decaying threshold; 0: none.
    """

    exits: tuple[int, ...]
    measure: Measure
    threshold: float | None
    guarantee: Guarantee | None
    risk: Risk
    decay: float
    decay_tokens: int

    def rule(self) -> Calm:
        """As the decoder takes it."""
        return Calm(self.exits, self.measure, self.decay, self.decay_tokens)


def parse_calm(text: str, config: ModelConfig) -> CalmOptions:
    """Read `measure,name=value,...`; the names are those of `_PARAMETERS`, exits are joined by +.

    Raises:
        UsageError: unknown or contradictory parameters, a model without exits, exits that it does not have.
    """
    parts = [part.strip() for part in text.split(",")] if text else []
    measure = next((one for one in MEASURES if parts and parts[0] == one), None)
    if measure is not None:
        parts = parts[1:]
    given = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name in given or name not in _PARAMETERS:
            _refuse(part)
        given[name] = value
    given_exits, risk = given.pop("exits", None), given.pop("risk", "agreement")
    if risk not in get_args(Risk):
        _refuse(f"risk={risk}", "risk=agreement or risk=loss")
    numbers = {name: _number(name, value) for name, value in given.items()}
    measure = measure or "softmax"
    exits = _exits(given_exits, config, measure)
    threshold, tolerance = numbers.get("threshold"), numbers.get("tolerance")
    if (threshold is None) == (tolerance is None):
        raise UsageError(
            "--policy calm needs a threshold or a guarantee",
            expected="one of threshold=T and tolerance=D",
            found="both" if threshold is not None else "neither",
            todo=_EXAMPLE,
        )
    if threshold is not None:
        if "confidence" in numbers or "risk" in text:
            _refuse("confidence and risk with a threshold", "tolerance=D with them")
        check_threshold(threshold, *RANGES[measure])
    guarantee = None
    if tolerance is not None:
        guarantee = Guarantee(tolerance, numbers.get("confidence", DEFAULT_CONFIDENCE))
    decay, decay_tokens = numbers.get("decay", 0.0), numbers.get("tokens", float(DEFAULT_DECAY_TOKENS))
    if not 0 <= decay < math.inf or decay_tokens != int(decay_tokens) or decay_tokens < 1:
        _refuse(f"decay={decay:g},tokens={decay_tokens:g}", "decay of 0 or more, tokens a whole number from 1 up")
    return CalmOptions(exits, measure, threshold, guarantee, _risk(risk), decay, int(decay_tokens))


@dataclass(frozen=True)
class CalmPlan(Plan):
    """What is given; under a guarantee the threshold is found on prompts of text.

    Args: given: measure, exits, threshold or guarantee.
    """

    window: ClassVar[int] = PROMPT_TOKENS

    given: CalmOptions = field(kw_only=True)

    def settle(
        self, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
    ) -> Sections:
        """Raises: UsageError: the guarantee cannot be met: too few prompts, or nothing can be skipped under it."""
        given = self.given
        threshold, guarantee, entry = given.threshold, None, None
        if given.guarantee is not None:
            assert text is not None
            threshold, guarantee = _guaranteed(given, given.guarantee, checkpoint, options, text, on_progress)
            entry = text_entry(text)
        assert threshold is not None
        least, most = RANGES[given.measure]
        policy = Policy(
            name="calm",
            branches=Calm.branches,
            inputs=(
                RuntimeInput(name="exit_threshold", least=least, most=most),
                RuntimeInput(name="full_until", least=0, most=None, default=0),
            ),
            # A decaying threshold counts new tokens, so the prompt runs in full; else a prompt's tokens may leave too.
            warm_up=0 if given.decay else None,
            exits=given.exits,
            confidence=Confidence(
                measure=given.measure,
                threshold=threshold,
                decay=given.decay,
                decay_tokens=given.decay_tokens,
                guarantee=guarantee,
            ),
            calibration=entry,
        )
        return policy, None


def plan_calm(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    """Raises: UsageError: as `parse_calm`, and options that it excludes."""
    refuse_budget("calm", choice, "what is kept follows from the exit threshold: calm:threshold=T, or calm:tolerance=D")
    refuse_rank("calm", choice)
    kv_policy = choice.kv_policy or "compute"
    refuse_none(kv_policy, "compute (K and V of the layers above, from the exit state) or copy with calm")
    given = parse_calm(parameters, config)
    return CalmPlan("calm", given.rule(), kv_policy, calibrates=given.guarantee is not None, given=given)


def _guaranteed(
    given: CalmOptions,
    guarantee: Guarantee,
    checkpoint: Checkpoint,
    options: DecoderOptions,
    text: TokenText,
    on_progress: OnProgress,
) -> tuple[float, GuaranteeSection]:
    """The boldest threshold under a guarantee, and how it was found."""
    found = calibrate_exits(
        checkpoint,
        text.ids,
        options,
        guarantee,
        given.risk,
        GRIDS[given.measure],
        lambda done, total: on_progress(Progress("calibrating exits", done, total)),
    )
    outcome = found.outcome
    if outcome.threshold is None:
        first = outcome.tested[0]
        raise UsageError(
            "nothing can be skipped under this guarantee",
            expected=f"a mean {given.risk} risk of at most {guarantee.tolerance:g} "
            f"with confidence {guarantee.confidence:g} at some threshold",
            found=f"{first.mean_risk:.3g} on {outcome.prompts} prompts (p-value {first.p_value:.2g}) "
            f"at the most careful, {first.threshold:g}",
            todo="give a larger tolerance, a lower confidence, more text, or a model trained with exits",
        )
    return outcome.threshold, GuaranteeSection(
        risk=given.risk,
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


_PARAMETERS = ("exits", "threshold", "tolerance", "confidence", "risk", "decay", "tokens")


def _exits(text: str | None, config: ModelConfig, measure: Measure) -> tuple[int, ...]:
    """The depths to ask at: given, or the checkpoint's, below the model's own."""
    inside = range(1, config.num_layers)
    trained = config.exit_classifiers
    if text is None and measure == "classifier" and trained:
        return trained
    if text is None:
        exits = tuple(sorted({depth for depth in config.exits if depth in inside}))
        if not exits:
            raise UsageError(
                "--policy calm needs exits, and this checkpoint names none",
                expected='"exits": [E, ...] in the "gsx" section of config.json, as gsx train writes it',
                found="no exit below the last layer",
                todo="train exits (gsx train), or name depths to try: calm:exits=4+8",
            )
    else:
        try:
            exits = tuple(sorted({int(part) for part in text.split("+")}))
        except ValueError:
            _refuse(f"exits={text}", "exits=4+8")
    if not all(depth in inside for depth in exits):
        raise UsageError(
            "--policy calm: its exits lie outside the model",
            expected=f"depths from 1 to {config.num_layers - 1}",
            found=", ".join(map(str, exits)),
        )
    untrained = [depth for depth in exits if depth not in trained]
    if measure == "classifier" and untrained:
        names = ", ".join(f"model.layers.{depth - 1}.{EXIT_CLASSIFIER}" for depth in untrained)
        raise UsageError(
            "--policy calm:classifier: the checkpoint lacks classifiers of its exits",
            expected=f'"exit_classifiers" in the "gsx" section of config.json, and weight and bias of {names}',
            found=f"classifiers behind {', '.join(map(str, trained))} layers" if trained else "none",
            todo=f"train them: gsx train --model MODEL --exit-classifiers {','.join(map(str, exits))} -o DIR; "
            "or take another measure: softmax, state",
        )
    return exits


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        _refuse(f"{name}={value}", f"{name}=NUMBER")


def _risk(text: str) -> Risk:
    return "loss" if text == "loss" else "agreement"


def _refuse(found: str, expected: str = "measure,name=value,...") -> NoReturn:
    raise UsageError("--policy calm: its parameters", expected=expected, found=repr(found), todo=_EXAMPLE) from None
