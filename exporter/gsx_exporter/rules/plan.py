"""A keep rule on its way into an export: what is asked for, the plan that fits a checkpoint, and what it settles to.

The refusals that several rules share are here too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import CalibrationText, Selection, SelectionMode
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import Branch, KvPolicy
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.text import WINDOW_TOKENS, TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress


@dataclass(frozen=True)
class PolicyOptions:
    """What is asked for.

    Args:
        policy: `NAME` or `NAME:parameters`; None for gateskip with gates, router with routers, else dense.
        select: how a rule with scores chooses.
        budget: share to keep, with rules that have thresholds; None for the rule's default.
        kv_policy: None for the rule's own default.
    """

    policy: str | None = None
    select: SelectionMode = "threshold"
    budget: float | None = None
    kv_policy: KvPolicy | None = None


@dataclass(frozen=True)
class Settled:
    """A rule with all its values.

    Args:
        rule: as the decoder takes it; None for a dense export.
        policy, selection: the manifest's sections, which amount to the same rule.
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
        budget: the exported one, with rules that have thresholds.
        calibrates: whether it reads calibration text.
        by_rank: whether it keeps the best of a call, so that a token's decision depends on later ones.
    """

    # Whether its bundles can leave out any branch, and so draft without some.
    drafts_layers: ClassVar[bool] = False
    # Tokens of a piece of calibration text.
    window: ClassVar[int] = WINDOW_TOKENS

    name: str
    branches: tuple[Branch, ...]
    kv_policy: KvPolicy
    budget: float | None = None
    calibrates: bool = False
    by_rank: bool = False

    @abstractmethod
    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """Calibrate what there is to calibrate. Args: text: where the plan reads one."""


def text_entry(text: TokenText) -> CalibrationText:
    """A text in the manifest."""
    return CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)


def refuse_both(name: str, option: str, why: str) -> NoReturn:
    """Refuse an option beside a policy that excludes it."""
    raise UsageError(f"{option} and --policy {name} exclude each other", expected="one of them", todo=why)


def refuse_rank(name: str, options: PolicyOptions) -> None:
    """Refuse selection by rank beside a policy that has no ranks."""
    if options.select == "rank":
        refuse_both(name, "--select rank", "it belongs to gateskip")


def refuse_budget(name: str, options: PolicyOptions, why: str) -> None:
    """Refuse a budget beside a policy that has other means."""
    if options.budget is not None:
        refuse_both(name, "--budget", why)


def refuse_none(kv_policy: KvPolicy, expected: str) -> None:
    """Refuse K/V policy `none` where a set of layers may change within a request."""
    if kv_policy == "none":
        raise UsageError(
            "--kv-policy none is for sets of layers that stay the same for a request", expected=expected, found="none"
        )
