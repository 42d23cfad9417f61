"""How much work a run is, and how much of it is done: what the line of progress shows."""

from __future__ import annotations

from collections.abc import Iterable

from gsx.parity.scope import Scope
from gsx_plugins.progress import OnProgress, Progress

# Tokens that a runner writes one by one while the reference reads a window.
_STEPS_PER_WINDOW = 32


class Work:
    """Work in units of a window that the reference reads in float32; only its shares count.

    Args:
        scopes: of all settings.
        double: whether the reference computes in float64.
        speculates: whether there is a draft.
    """

    def __init__(self, scopes: Iterable[Scope], on_progress: OnProgress, *, double: bool, speculates: bool) -> None:
        self._double, self._speculates, self._on_progress = double, speculates, on_progress
        self._done = 0.0
        self._total = sum(self._of(scope) for scope in scopes)

    @property
    def window(self) -> float:
        """Of reading one window."""
        return 2.0 if self._double else 1.0

    def text(self, scope: Scope) -> float:
        """Of writing the greedy text."""
        return scope.greedy_tokens / _STEPS_PER_WINDOW

    def speculation(self, scope: Scope) -> float:
        """Of the speculative texts."""
        texts = scope.texts if self._speculates else None
        return 0.0 if texts is None else texts.generations * texts.new_tokens / _STEPS_PER_WINDOW

    def begin(self, stage: str, work: float = 0.0) -> None:
        """Report a step before it begins. Args: work: that it takes."""
        self._on_progress(Progress(stage, share=self._done / self._total))
        self._done += work

    def _of(self, scope: Scope) -> float:
        windows = (3 * scope.windows + (scope.rounded if self._double else 0)) * self.window
        return self.text(scope) + windows + self.speculation(scope)
