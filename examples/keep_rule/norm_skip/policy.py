"""`--policy norm-skip[:branch=attn|mlp]`: its parameters, its calibration, and its section of the manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.policy import OutsidePolicy, Policy, score_input
from gsx_engines.bundle.selection import Selection
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.rules.parameters import Parameters, read_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled, refuse_none, refuse_rank
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import budget_settings, calibrated_budgets, exported_budget
from gsx_exporter.rules.thresholds import at_budget
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress
from norm_skip.reference import LargeStates
from norm_skip.traced import NormSkip


class NormSkipOptions(Parameters):
    """The parameters after the colon. Args: branch: the only branch that may be skipped; None for both."""

    branch: Literal["attn", "mlp"] | None = None


@dataclass(frozen=True)
class NormSkipPlan(RulePlan):
    """The rule on a checkpoint; its thresholds are still to be calibrated."""

    rule: NormSkip = field(kw_only=True)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """Calibrate thresholds on text, and record the rule."""
        selection = at_budget(self, self.rule, checkpoint, text, on_progress)
        policy = OutsidePolicy(
            name="norm-skip",
            branches=self.branches,
            inputs=(score_input("threshold", 0, None),),
            parameters={"skipped": list(self.branches)},
        )
        return Settled(self.rule, policy, selection)


def plan(options: PolicyOptions, config: ModelConfig, text: str) -> RulePlan:
    """Raises: UsageError: unknown parameters, or options that this rule does not have."""
    given = read_parameters("norm-skip", NormSkipOptions, text, "branch=attn or branch=mlp, or none for both")
    refuse_rank("norm-skip", options)
    kv_policy = options.kv_policy or "compute"
    refuse_none(kv_policy, "compute or copy with norm-skip, where another token may need a skipped token's K and V")
    branches = BRANCHES if given.branch is None else (given.branch,)
    budget = options.budget or 0.8
    return NormSkipPlan("norm-skip", branches, kv_policy, budget, calibrates=True, rule=NormSkip(branches))


def traced(recorded: Recorded) -> NormSkip:
    """The rule that a manifest records."""
    return NormSkip(recorded.policy.branches)


def reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> LargeStates:
    """The same by masks, with a request's thresholds."""
    return LargeStates(controls["thresholds"], policy.branches)


NORM_SKIP = Rule(
    name="norm-skip",
    plan=plan,
    traced=traced,
    reference=reference,
    settings=budget_settings,
    exported_share=exported_budget,
    compared={"norm-skip": {"norm-skip": calibrated_budgets}},
)
