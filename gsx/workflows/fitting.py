"""Which policies fit a checkpoint, and which of them is the whole model: `gsx compare`, `gsx tune`."""

from __future__ import annotations

from dataclasses import dataclass

from gsx_engines.bundle.controls import KeepSettings
from gsx_exporter.config import ModelConfig
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import DENSE, every_rule, plan_policy
from gsx_exporter.rules.rule import Curves
from gsx_plugins.errors import UsageError


@dataclass(frozen=True)
class Fitting:
    """The policies of a checkpoint.

    Args:
        whole: the policy that runs the whole model; keep_all: with these keep settings.
        curves: `--policy` text -> the curves of its settings.
        refused: name of a policy that does not fit -> the reason.
    """

    whole: str
    keep_all: KeepSettings
    curves: dict[str, Curves]
    refused: dict[str, str]


def fitting_policies(config: ModelConfig) -> Fitting:
    """The policies that fit a checkpoint.

    The whole model is the dense export. Where gates or routers multiply a branch's output there is none, and it is the
    first rule that can run everything.
    """
    rules, refused = every_rule()
    compared = {policy: curves for rule in rules.values() for policy, curves in rule.compared.items()}
    whole = {DENSE: KeepSettings(), **{rule.name: rule.whole for rule in rules.values() if rule.whole is not None}}
    fit = set()
    for policy in dict.fromkeys([*whole, *compared]):
        try:
            plan_policy(PolicyOptions(policy), config)
            fit.add(policy)
        except UsageError as error:
            if policy in compared:
                refused[name_of(policy)] = error.what
    base = next(policy for policy in whole if policy in fit)
    return Fitting(base, whole[base], {policy: curves for policy, curves in compared.items() if policy in fit}, refused)


def name_of(policy: str) -> str:
    """A policy's name, without its parameters."""
    return policy.partition(":")[0]
