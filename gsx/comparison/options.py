"""What a bundle is exported with, as far as `gsx compare` and `gsx tune` choose it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import SchemeName

_SCHEME_WORDS: dict[SchemeName, tuple[str, ...]] = {
    "int8": ("--int8",),
    "int8-weights": ("--int8", "--weights-only"),
    "int4": ("--int4",),
    "fp8": ("--fp8",),
}


@dataclass(frozen=True)
class ExportOptions:
    """The options.

    Args:
        policy: as `--policy` takes it.
        budget: None for the rule's default.
        scheme: of quantization; None for none.
        draft: as `--draft` takes it; None for none.
    """

    policy: str
    budget: float | None = None
    scheme: SchemeName | None = None
    draft: str | None = None

    @property
    def rule(self) -> str:
        """The policy's name, without its parameters."""
        return self.policy.partition(":")[0]

    @property
    def name(self) -> str:
        """In a few words, for messages and for folders' names."""
        draft = None if self.draft is None else f"draft {self.draft}"
        return " ".join(part for part in (self.rule, self.scheme, draft) if part)

    def by_default(self, keep: KeepSettings) -> ExportOptions:
        """The options of a bundle that does by default what this one does with the keep settings of a request."""
        if keep.budget is not None:
            return replace(self, budget=keep.budget)
        if keep.layers is not None:
            return replace(self, policy=f"layers:{keep.layers}")
        if keep.exit is not None:
            return replace(self, policy=f"layers:0-{keep.exit - 1}")
        if keep.speedup is not None:
            return replace(self, policy=f"unified:{keep.speedup!r}")
        if keep.exit_threshold is not None:
            return replace(self, policy=f"{self.rule}:threshold={keep.exit_threshold!r}")
        if keep.loops is not None:
            return replace(self, policy=f"{self.rule}:{keep.loops}")
        return self

    def words(self, default_policy: str) -> list[str]:
        """As options of `gsx export`. Args: default_policy: what the checkpoint gets without `--policy`."""
        words = [] if self.policy == default_policy else ["--policy", self.policy]
        words += [] if self.budget is None else ["--budget", f"{self.budget:g}"]
        words += [] if self.scheme is None else _SCHEME_WORDS[self.scheme]
        return words + ([] if self.draft is None else ["--draft", self.draft])
