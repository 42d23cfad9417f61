"""What a run has found at one setting, and the result that it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gsx.parity.closeness import Compared, Comparer, Observation
from gsx.parity.difference import Accumulator
from gsx.parity.greedy import Greedy, GreedyText, ReferenceStep, follow
from gsx.parity.quality import QualityCounter, frequency_nats
from gsx.parity.result import BudgetResult, Tokens
from gsx.parity.scope import Scope
from gsx.parity.speculation import SpeculationResult
from gsx.parity.store import Rows
from gsx.parity.tolerances import Tolerances
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.rules.settings import Setting


@dataclass(frozen=True)
class Padded:
    """A padded batch [2, S], and what the reference finds of each of its rows."""

    ids: np.ndarray
    mask: np.ndarray
    want: list[Observation]


@dataclass
class Found:
    """What is known so far at one setting.

    Args:
        windows: the reference's observations.
        rounding: the reference in float32 against itself in float64; None if it is in float32.
        padded: batches to try in turn.
        text, steps: the fast runner's greedy text, and what the reference says of it.
        against: the engine against the reference; fast: the fast runner's logits.
        portable: by window, logits of the portable runner, if the fast one is compared with them.
        portable_elsewhere: by window, [S]: tokens that went to other experts there than in the reference.
        clean: by window, the tokens of which the fast runner's logits were compared.
    """

    setting: Setting
    scope: Scope
    controls: RuntimeValues
    text: GreedyText
    against: Comparer
    quality: QualityCounter
    windows: list[Observation] = field(default_factory=list)
    rounding: Comparer | None = None
    padded: list[Padded] = field(default_factory=list)
    steps: list[ReferenceStep] = field(default_factory=list)
    portable: list[Rows] = field(default_factory=list)
    portable_keep: list[np.ndarray] = field(default_factory=list)
    portable_elsewhere: list[np.ndarray] = field(default_factory=list)
    portable_text: GreedyText | None = None
    cached: tuple[Compared, Compared] | None = None
    padded_result: Compared | None = None
    fast: Accumulator = field(default_factory=Accumulator)
    clean: list[np.ndarray] = field(default_factory=list)
    wrong_counts: int = 0

    @property
    def own_error(self) -> float:
        """The portable runner's largest error of states over their scale: logits of routers that are nearer than this
        may be in another order in another runner."""
        return max((layer.max_relative for layer in self.against.result().states), default=0.0)

    def result(
        self, manifest: Manifest, limits: Tolerances, windows: np.ndarray, speculation: SpeculationResult | None
    ) -> BudgetResult:
        """Everything that the report says of this setting. Args: windows: [M, S] ids that were read."""
        rounding = self.rounding.result() if self.rounding is not None else None
        kept = np.concatenate([want.keep for want in self.windows], axis=-1).mean(axis=-1)
        shares = [kept[layer, BRANCHES.index(branch)] for layer, branch in manifest.skippable_places]
        reference_nats, engine_nats = self.quality.nats
        assert self.padded_result is not None, "every setting has a padded batch"

        def tolerance(logits: np.ndarray) -> float:
            return limits.logit_limit(float(np.abs(logits).max()), rounding) or 0.0

        def followed(text: GreedyText) -> Greedy:
            return follow(
                text,
                self.steps,
                manifest.skippable_places,
                logit_tolerance=tolerance,
                near_tie=limits.near_tie,
                near_route=self.own_error,
            )

        greedy = {"fast": followed(self.text)}
        if self.portable_text is not None:
            greedy["portable"] = followed(self.portable_text)
        single_steps, one_chunk = self.cached or (None, None)
        return BudgetResult(
            setting=self.setting.name,
            budget=self.setting.share,
            kept=tuple((float(attn), float(mlp)) for attn, mlp in kept),
            kept_share=float(np.mean(shares)) if shares else None,
            windows=self.against.result(),
            rounding=rounding,
            single_steps=single_steps,
            one_chunk=one_chunk,
            padded=self.padded_result,
            fast_logits=self.fast.result(),
            fast_wrong_counts=self.wrong_counts,
            greedy=greedy,
            speculation=speculation,
            reference_nats=reference_nats,
            engine_nats=engine_nats,
            frequency_nats=frequency_nats(windows[: self.scope.windows, 1:]),
            scored_tokens=self.quality.scored_tokens,
            quality=self.quality.result(),
            tokens=self._tokens(windows.shape[1]),
            part=self.scope.part,
        )

    def _tokens(self, length: int) -> Tokens:
        return Tokens(
            windows=self.scope.windows * length,
            compared=self.scope.compared * length,
            rounded=self.scope.rounded * length,
            cached=self.scope.cached_tokens,
            padded=int(self.padded[0].mask.sum()),
            greedy=len(self.text.tokens),
        )
