"""A keep rule on its way into an export: the options, the plan that fits a checkpoint, and the calibrated result.

The checks that several rules share are here too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import CalibrationText, Selection
from gsx_engines.bundle.words import Branch, KvPolicy, SelectionMode
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.text import WINDOW_TOKENS, TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress


@dataclass(frozen=True)
class PolicyOptions:
    """The policy and its options, as asked for.

    Args:
        policy: `NAME` or `NAME:parameters`; None for gateskip if the checkpoint has gates, router if it has routers,
            else dense.
        select: how a rule with scores selects: by threshold or by rank.
        budget: share to keep, for rules that have thresholds; None for the rule's default.
        kv_policy: K and V of skipped tokens; None for the rule's default.
    """

    policy: str | None = None
    select: SelectionMode = "threshold"
    budget: float | None = None
    kv_policy: KvPolicy | None = None


@dataclass(frozen=True)
class Settled:
    """A calibrated rule.

    Args:
        rule: the traced rule; None for a dense export.
        policy, selection: the manifest's sections, which describe the same rule.
    """

    rule: TracedRule | None
    policy: Policy | None
    selection: Selection | None = None


@dataclass(frozen=True)
class RulePlan(ABC):
    """A keep rule that fits a checkpoint; some of its values may still have to be calibrated.

    Args:
        name: of the policy.
        branches: those that it may skip; empty for a dense export.
        kv_policy: K and V of skipped tokens.
        budget: the exported budget, for rules that have thresholds.
        calibrates: whether it reads calibration text.
        by_rank: whether it keeps the best tokens of a call, so that a token's decision depends on later tokens.
    """

    # Whether its bundles can skip any set of branches, and so draft with fewer layers.
    drafts_layers: ClassVar[bool] = False
    # Length of a window of calibration text, in tokens.
    window: ClassVar[int] = WINDOW_TOKENS

    name: str
    branches: tuple[Branch, ...]
    kv_policy: KvPolicy
    budget: float | None = None
    calibrates: bool = False
    by_rank: bool = False

    def of_model(self, config: ModelConfig) -> ModelConfig:
        """The model as the rule needs it."""
        return config

    @abstractmethod
    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """Calibrate the rule. Args: text: calibration text; None if the plan does not calibrate."""


def text_entry(text: TokenText) -> CalibrationText:
    """The manifest's entry for a calibration text."""
    return CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)


def refuse_both(name: str, option: str, why: str) -> NoReturn:
    """Refuse an option that a policy excludes.

    Raises:
        UsageError: always; `why` is what to do, or the reason.
    """
    raise UsageError(f"{option} and --policy {name} exclude each other", expected="one of them", todo=why)


def refuse_rank(name: str, options: PolicyOptions) -> None:
    """Refuse selection by rank with a policy that has no scores to rank."""
    if options.select == "rank":
        refuse_both(name, "--select rank", "selection by rank is for gateskip and router")


def refuse_budget(name: str, options: PolicyOptions, why: str) -> None:
    """Refuse a budget with a policy that sets the share in another way."""
    if options.budget is not None:
        refuse_both(name, "--budget", why)


def refuse_kv_policy(name: str, kv_policy: KvPolicy, config: ModelConfig) -> None:
    """Refuse what is not one cache for all loops, where a looped model has that (`Loops.caches`)."""
    if config.shares_caches and kv_policy != "copy":
        raise UsageError(
            f"--policy {name} --kv-policy {kv_policy}: the loops share a cache, which keeps what the last one gave",
            expected="copy, which is the default here",
            found=kv_policy,
        )


def refuse_none(kv_policy: KvPolicy, expected: str) -> None:
    """Refuse the K/V policy `none` with a rule whose decisions may change within a request."""
    if kv_policy == "none":
        raise UsageError(
            "--kv-policy none is for sets of layers that stay the same for a request", expected=expected, found="none"
        )
