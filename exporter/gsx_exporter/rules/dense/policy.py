"""`--policy dense`: every token runs everything. The default for a checkpoint without gates or routers."""

from __future__ import annotations

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.rules.parameters import bad_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress


class DensePlan(RulePlan):
    """No rule, nothing to calibrate."""

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`."""
        return Settled(None, None)


def plan_dense(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `dense`.

    Raises:
        UsageError: a gated checkpoint, whose gates multiply the branches' outputs, or options that need gates.
    """
    if parameters:
        bad_parameters("dense", "no parameters", parameters)
    if config.gate is not None:
        raise UsageError(
            "--policy dense: the checkpoint has gates, which multiply the branches' outputs",
            expected="a checkpoint without gates",
            todo="export with gateskip, the default; --budget 1 keeps everything",
        )
    for name, given in (
        ("--budget", options.budget is not None and options.budget != 1),
        (f"--kv-policy {options.kv_policy}", options.kv_policy not in (None, "compute")),
    ):
        if given:
            raise UsageError(
                f"{name} needs gates, and this checkpoint has none",
                expected='a "gsx" section with "gate" in config.json, and gate tensors; or a policy without gates',
                found="a dense model",
                todo="train gates first (gsx train), give --policy, or leave the option out for a dense export",
            )
    return DensePlan("dense", (), "compute")
