"""What the rest of gsx knows of a keep rule: a `Rule`, made of functions from the rule's folder."""

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
        selection: for rules that select by threshold or by rank; else None.
        config: of the checkpoint.
    """

    policy: Policy
    selection: Selection | None
    config: ModelConfig


@dataclass(frozen=True)
class Rule:
    """A keep rule.

    Args:
        name: as in `--policy` and gsx.json.
        plan: options -> the rule plan for a checkpoint. The text is what follows the colon after the name. Raises
            UsageError if the checkpoint lacks what the rule needs, or if options exclude each other.
        traced: the traced rule.
        reference: the reference rule, with the run-time inputs of a request.
        settings: the settings that `gsx verify` verifies, sorted from the one that keeps most to the one that keeps
            least. Takes budgets, or None for the default ones, and a list of notes, to which it adds what cannot be
            verified.
        exported_share: the share of skippable work that is kept by default.
        compared: `--policy` text -> the curves that `gsx compare` draws from its bundle.
        whole: keep settings with which a bundle runs the whole model, if `gsx compare` may use that as the baseline;
            None otherwise.
        layer_curves: curves of its calibration, for the parity report.
    """

    name: str
    plan: Callable[[PolicyOptions, ModelConfig, str], RulePlan]
    traced: Callable[[Recorded], TracedRule]
    reference: Callable[[Policy, Selection | None, RuntimeValues], ReferenceRule]
    settings: Callable[[Manifest, Sequence[float] | None, list[str]], list[Setting]]
    exported_share: Callable[[Manifest], float]
    compared: Mapping[str, Curves] = field(default_factory=dict)
    whole: KeepSettings | None = None
    layer_curves: Callable[[Manifest], Sequence[LayerCurve]] = lambda manifest: ()
