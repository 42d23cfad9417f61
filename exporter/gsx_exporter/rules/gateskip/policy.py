"""`--policy gateskip`: the checkpoint's gates decide, by calibrated thresholds or by rank. The default with gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.policy import Policy, gateskip_policy
from gsx_engines.bundle.selection import Selection
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.gateskip.reference import Rank, Threshold
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.rules.parameters import bad_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled, refuse_none
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import budget_settings, calibrated_budgets, exported_budget
from gsx_exporter.rules.thresholds import at_budget
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress


@dataclass(frozen=True)
class GateSkipPlan(RulePlan):
    """The gates of a checkpoint, and a budget."""

    drafts_layers: ClassVar[bool] = True

    rule: GateSkip = field(kw_only=True)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`."""
        selection = at_budget(self, self.rule, checkpoint, text, on_progress)
        return Settled(self.rule, gateskip_policy(selection.mode, self.rule.branches), selection)


def plan_gateskip(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `gateskip`.

    Raises:
        UsageError: a checkpoint without gates, or a K/V policy that its gates do not allow.
    """
    if parameters:
        bad_parameters("gateskip", "no parameters: its options are --budget and --select", parameters)
    gate = config.gate
    if gate is None:
        raise UsageError(
            "--policy gateskip needs gates, and this checkpoint has none",
            expected='"gate" in the "gsx" section of config.json, and the tensors model.layers.{i}.attn_gate.weight, '
            "attn_gate.bias, mlp_gate.weight and mlp_gate.bias",
            found="a dense model",
            todo="train gates (gsx train), or export with a policy that needs no gates: --policy layers",
        )
    kv_policy = options.kv_policy or "compute"
    refuse_none(kv_policy, "compute or copy with gateskip, where another token may need a skipped token's K and V")
    if kv_policy == "copy" and "attn" not in gate.branches:
        raise UsageError(
            "--kv-policy copy needs gates on the attention branch", found="gates on " + ", ".join(gate.branches)
        )
    by_rank = options.select == "rank"
    if by_rank and gate.skip_weights is not None:
        raise UsageError(
            "--select rank keeps the same share at every branch, and this checkpoint's gates were trained to share a "
            "budget unevenly",
            found="gsx.gate.skip_weights in its configuration",
            todo="leave --select out",
        )
    return GateSkipPlan(
        "gateskip",
        gate.branches,
        kv_policy,
        options.budget or 1.0,
        calibrates=not by_rank,
        by_rank=by_rank,
        rule=GateSkip.of(config, options.select),
    )


def _traced(recorded: Recorded) -> GateSkip:
    assert recorded.selection is not None
    return GateSkip.of(recorded.config, recorded.selection.mode)


def _reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> ReferenceRule:
    assert selection is not None
    return Rank(float(controls["budget"])) if selection.mode == "rank" else Threshold(controls["thresholds"])


GATESKIP = Rule(
    name="gateskip",
    plan=plan_gateskip,
    traced=_traced,
    reference=_reference,
    settings=budget_settings,
    exported_share=exported_budget,
    compared={"gateskip": {"gateskip": calibrated_budgets}},
)
