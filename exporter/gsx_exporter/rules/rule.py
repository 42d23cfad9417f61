"""What the rest of gsx knows of a keep rule: one `Rule` for each, made of functions of the rule's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gsx_engines.bundle.controls import KeepSettings, RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import Selection
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.plan import PolicyOptions, RulePlan
from gsx_exporter.rules.settings import Curve, LayerCurve, Setting

# Name of a curve -> its settings on a bundle.
Curves = Mapping[str, Callable[[Manifest], Curve]]


@dataclass(frozen=True)
class Recorded:
    """A rule as a bundle records it.

    Args:
        policy: the manifest's section.
        selection: with rules that have thresholds or ranks.
        config: of the checkpoint.
    """

    policy: Policy
    selection: Selection | None
    config: ModelConfig


@dataclass(frozen=True)
class Rule:
    """A keep rule.

    Args:
        name: as `--policy` takes it and gsx.json records it.
        doc: what it does, in one line, for `gsx export --help`.
        plan: what is asked for -> the rule on a checkpoint, before calibration. The text is what follows the name's
            colon. Raises UsageError where the checkpoint lacks what the rule needs, or options exclude each other.
        traced: the rule as the decoder takes it.
        reference: the same as masks, with the run-time inputs of a request.
        settings: what `gsx verify` verifies at, in falling order of what they keep; asked: budgets, or None for the
            usual ones; what cannot be verified is added to the notes.
        exported_share: the share of skippable work that is kept by default.
        compared: `--policy` text -> the curves that `gsx compare` draws from its bundle.
        whole: what to ask a bundle of it for so that it runs the whole model, where `gsx compare` may measure against
            that; None where it may not.
        layer_curves: what a parity report shows of its calibration.
    """

    name: str
    doc: str
    plan: Callable[[PolicyOptions, ModelConfig, str], RulePlan]
    traced: Callable[[Recorded], TracedRule]
    reference: Callable[[Policy, Selection | None, RuntimeValues], ReferenceRule]
    settings: Callable[[Manifest, Sequence[float] | None, list[str]], list[Setting]]
    exported_share: Callable[[Manifest], float]
    compared: Mapping[str, Curves] = field(default_factory=dict)
    whole: KeepSettings | None = None
    layer_curves: Callable[[Manifest], Sequence[LayerCurve]] = lambda manifest: ()
