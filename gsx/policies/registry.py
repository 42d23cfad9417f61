"""`--policy NAME[:parameters]`: which rule an export has, and whether it fits the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gsx.policies.base import Choice, Plan, bad_parameters
from gsx.policies.calm import plan_calm
from gsx.policies.dense import plan_dense
from gsx.policies.ffn_skip import plan_ffn_skip
from gsx.policies.gateskip import plan_gateskip
from gsx.policies.layers import plan_layers, plan_unified
from gsx.policies.router import plan_router
from gsx_exporter.config import ModelConfig
from gsx_plugins.errors import UsageError

POLICIES: Mapping[str, Callable[[Choice, ModelConfig, str], Plan]] = {
    "gateskip": plan_gateskip,
    "router": plan_router,
    "layers": plan_layers,
    "unified": plan_unified,
    "ffn-skip": plan_ffn_skip,
    "calm": plan_calm,
    "dense": plan_dense,
}


def plan_policy(choice: Choice, config: ModelConfig) -> Plan:
    """The rule that is asked for, if the checkpoint has what it needs.

    Raises:
        UsageError: an unknown policy, options that exclude each other, a checkpoint without what the rule needs.
    """
    name, colon, parameters = (choice.policy or _default(config)).partition(":")
    plan = POLICIES.get(name)
    if plan is None:
        raise UsageError(f"policy {name!r} is not known", expected="one of " + ", ".join(POLICIES), found=repr(name))
    if colon and not parameters:
        bad_parameters(name, "some after the colon, or no colon", f"{name}:")
    if config.router is not None and name != "router":
        raise UsageError(
            f"--policy {name}: the checkpoint has routers, which say what runs",
            expected="a checkpoint without routers",
            todo="export with router, the default; --budget 1 keeps everything",
        )
    return plan(choice, config, parameters)


def _default(config: ModelConfig) -> str:
    return "gateskip" if config.gate else "router" if config.router else "dense"
