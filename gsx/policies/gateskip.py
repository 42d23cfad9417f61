"""`--policy gateskip`: the checkpoint's own gates choose, by calibrated thresholds or by rank. Default with gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gsx.policies.base import Choice, OnProgress, Plan, Sections, bad_parameters, refuse_none
from gsx.policies.thresholds import at_budget
from gsx_engines.bundle.policy import gateskip_policy
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.rules.gateskip import GateSkip
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError


@dataclass(frozen=True)
class GateSkipPlan(Plan):
    """Gates, and a budget."""

    drafts_layers: ClassVar[bool] = True

    def settle(
        self, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
    ) -> Sections:
        assert self.rule is not None
        selection = at_budget(self, checkpoint, options, text, on_progress)
        return gateskip_policy(selection.mode, self.rule.branches), selection


def plan_gateskip(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    """Raises: UsageError: a checkpoint without gates, a K/V policy that its gates do not allow."""
    if parameters:
        bad_parameters("gateskip", "none: --budget and --select are its options", parameters)
    gate = config.gate
    if gate is None:
        raise UsageError(
            "--policy gateskip needs gates, and this checkpoint has none",
            expected='"gate" in the "gsx" section of config.json, and the tensors model.layers.{i}.attn_gate.weight, '
            "attn_gate.bias, mlp_gate.weight and mlp_gate.bias",
            found="a dense model",
            todo="train gates (gsx train), or export with a policy that needs none: --policy layers",
        )
    kv_policy = choice.kv_policy or "compute"
    refuse_none(kv_policy, "compute or copy with gateskip, where another token may need a skipped token's K and V")
    if kv_policy == "copy" and "attn" not in gate.branches:
        raise UsageError(
            "--kv-policy copy needs gates on the attention branch", found="gates on " + ", ".join(gate.branches)
        )
    rule = GateSkip(gate, config.eos_ids, choice.select)
    return GateSkipPlan("gateskip", rule, kv_policy, choice.budget or 1.0, calibrates=choice.select == "threshold")
