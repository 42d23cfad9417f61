"""What is asked for, what every policy makes of it, and the refusals that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import CalibrationText
from gsx_engines.bundle.selection import Selection as SelectionSection
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import KvPolicy
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.rules.base import KeepRule
from gsx_exporter.rules.gateskip import Selection
from gsx_exporter.text import WINDOW_TOKENS, TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import Progress

OnProgress = Callable[[Progress], None]
Sections = tuple[Policy | None, SelectionSection | None]


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Args:
        policy: `NAME` or `NAME:parameters`; None for gateskip with gates, router with routers, else dense.
        select: how GateSkip chooses.
        budget: share to keep, with rules that have thresholds; None for 1.
        kv_policy: None for the rule's own default.
    """

    policy: str | None = None
    select: Selection = "threshold"
    budget: float | None = None
    kv_policy: KvPolicy | None = None


@dataclass(frozen=True)
class Plan(ABC):
    """A keep rule that fits a checkpoint.

    Args:
        name: of the policy.
        rule: as the decoder takes it; None for a dense export.
        kv_policy: K and V of skipped tokens.
        budget: the exported one, with rules that have thresholds.
        calibrates: whether it reads calibration text.
    """

    # Whether its bundles can leave any branch out, and so draft without some.
    drafts_layers: ClassVar[bool] = False
    # Tokens of a piece of calibration text.
    window: ClassVar[int] = WINDOW_TOKENS

    name: str
    rule: KeepRule | None
    kv_policy: KvPolicy
    budget: float | None = None
    calibrates: bool = False

    @abstractmethod
    def settle(
        self, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
    ) -> Sections:
        """Calibrate what there is to calibrate. Returns: the manifest's sections.

        Args: text: where the plan reads one.
        """


def text_entry(text: TokenText) -> CalibrationText:
    """A text in the manifest."""
    return CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)


def refuse_both(name: str, option: str, why: str) -> NoReturn:
    """Refuse an option beside a policy that excludes it."""
    raise UsageError(f"{option} and --policy {name} exclude each other", expected="one of them", todo=why)


def refuse_rank(name: str, choice: Choice) -> None:
    """Refuse selection by rank beside a policy that has no ranks."""
    if choice.select == "rank":
        refuse_both(name, "--select rank", "it belongs to gateskip")


def refuse_budget(name: str, choice: Choice, why: str) -> None:
    """Refuse a budget beside a policy that has other means."""
    if choice.budget is not None:
        refuse_both(name, "--budget", why)


def refuse_none(kv_policy: KvPolicy, expected: str) -> None:
    """Refuse K/V policy `none` where a set of layers may change within a request."""
    if kv_policy == "none":
        raise UsageError(
            "--kv-policy none is for sets of layers that stay the same for a request", expected=expected, found="none"
        )


def bad_parameters(name: str, expected: str, found: str) -> NoReturn:
    """Refuse what stands behind the colon."""
    raise UsageError(f"--policy {name}: its parameters", expected=expected, found=repr(found)) from None
