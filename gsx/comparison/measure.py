"""Quality and time of a bundle's settings on ONNX Runtime, as a request sees them.

The first half of a window of text is the prompt, and the rest follows with the prompt's K/V in the cache, so that rules
that run prompts in full do so here. The prompt is timed in one call, and so are single tokens at the window's end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gsx.parity.estimate import Estimate
from gsx.parity.quality import closeness
from gsx.parity.store import Rows, Store, Stored
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.runners.base import StepOutput
from gsx_engines.runners.select import open_runner
from gsx_exporter.evaluation import next_tokens
from gsx_plugins.progress import OnProgress, Progress, silent

# The fewest tokens that say anything, prompts included.
LEAST_TOKENS = 512
# Number of single tokens of a window that are timed.
STEPS = 16
# Rounds that count: at least, and at most while time is left. One round before them is a warm-up.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 25
SECONDS = 20.0


@dataclass(frozen=True)
class Score:
    """Result of a setting on a text.

    Args:
        prompt_kept, kept: share of all (token, branch) pairs that ran, in prompts and in the tokens after them.
        perplexity: of the tokens after the prompts.
        divergence: mean KL divergence of their next-token distributions from the whole model's, in nats.
        differing: share of these whose most likely token is another one.
    """

    prompt_kept: float
    kept: float
    perplexity: float
    divergence: Estimate
    differing: Estimate


class WholeModel:
    """The whole model's next-token logits, on disk: what all settings are compared with.

    Args: store: where they wait. The first bundle that is scored with this is the whole model, on all windows.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._rows: list[Stored] = []

    def of(self, number: int, logits: np.ndarray) -> Rows:
        """The whole model's logits of a window. Args: logits: [S, V] of what is scored, the whole model if it is the
        first."""
        if number < len(self._rows):
            return self._rows[number]
        self._rows.append(self._store.put(logits))
        return logits


class MeasuredBundle:
    """A loaded bundle whose settings are scored and timed.

    Args:
        windows: [M, S] int64, the text.
    """

    def __init__(self, bundle: Bundle, windows: np.ndarray) -> None:
        self.bundle = bundle
        self._windows = windows
        self.prompt_tokens = windows.shape[1] // 2
        self._runner = open_runner(bundle)
        # One cache for all calls, so that its bindings are made once.
        self._cache = self._runner.new_cache(1, windows.shape[1])

    def score(
        self,
        keep: KeepSettings,
        whole: WholeModel,
        windows: slice = slice(None),
        *,
        on_progress: OnProgress = silent,
    ) -> Score:
        """Run windows with a setting, and compare it with the whole model.

        Args: windows: which of them, from the first on.
        """
        prompts, rests, tokens = [], [], []
        total = len(self._windows[windows])
        for number, (prompt_kept, kept, logits, rest) in enumerate(self.run(keep, windows)):
            on_progress(Progress("scoring", number, total))
            prompts.append(prompt_kept)
            rests.append(kept)
            tokens.append(next_tokens(rest, whole.of(number, logits), logits))
        close = closeness(tokens)
        nats = float(np.concatenate([one.losses for one in tokens]).mean())
        return Score(float(np.mean(prompts)), float(np.mean(rests)), math.exp(nats), close.divergence, close.differing)

    def run(
        self, keep: KeepSettings, windows: slice = slice(None)
    ) -> Iterator[tuple[float, float, np.ndarray, np.ndarray]]:
        """Run windows with a setting.

        Returns: for each window the share kept in its prompt and after it, and logits [S, V] and ids [S] of the rest.
        """
        controls = controls_for(self.bundle.manifest, keep, [self.prompt_tokens])
        for window in self._windows[windows]:
            self._cache.roll_back([0])
            prompt, rest = window[None, : self.prompt_tokens], window[None, self.prompt_tokens :]
            prompt_kept = self._kept(self._runner.step(self._cache, prompt, controls, logits="none"), prompt)
            output = self._runner.step(self._cache, rest, controls, logits="all")
            yield prompt_kept, self._kept(output, rest), output.logits[0], rest[0]

    def seconds(self, keep: KeepSettings, number: int) -> np.ndarray:
        """Seconds of a prompt and of a single token, [2]. Args: number: of the window; starts again after the last."""
        controls = controls_for(self.bundle.manifest, keep, [self.prompt_tokens])
        window = self._windows[number % len(self._windows)][None]
        step, cache = self._runner.step, self._cache
        cache.roll_back([0])
        began = time.perf_counter()
        step(cache, window[:, : self.prompt_tokens], controls)
        prompt = time.perf_counter() - began
        step(cache, window[:, self.prompt_tokens : -STEPS], controls, logits="none")
        began = time.perf_counter()
        for place in range(-STEPS, 0):
            step(cache, window[:, window.shape[1] + place, None], controls)
        return np.array([prompt, (time.perf_counter() - began) / STEPS])

    def _kept(self, output: StepOutput, ids: np.ndarray) -> float:
        """Share of all (token, branch) pairs of a call that ran. Branches that no rule may skip always run."""
        skipped = 0 if output.kept is None else output.gated_rows - int(output.kept.sum())
        return 1 - skipped / (ids.size * self.bundle.manifest.decoder.num_layers * len(BRANCHES))


def windows_in(seconds: float, bundle: Bundle, windows: np.ndarray, keep: KeepSettings) -> int:
    """How many windows are scored in some seconds, at least as many as the fewest tokens need."""
    measured = MeasuredBundle(bundle, windows[:1])
    list(measured.run(keep))
    began = time.monotonic()
    list(measured.run(keep))
    return max(math.ceil(LEAST_TOKENS / windows.shape[1]), int(seconds / (time.monotonic() - began)))


def in_turn(
    timed: Sequence[tuple[MeasuredBundle, KeepSettings]], seconds: float, on_progress: OnProgress
) -> np.ndarray:
    """Time settings in turn.

    Args: seconds: how long, if that is enough for the fewest rounds.
    Returns: seconds [rounds, settings, 2] of a prompt and of a single token.
    """
    found: list[list[np.ndarray]] = []
    began = time.perf_counter()
    while len(found) <= FEWEST_ROUNDS or (len(found) <= MOST_ROUNDS and time.perf_counter() - began < seconds):
        on_progress(Progress("timing", len(found), MOST_ROUNDS + 1))
        found.append([bundle.seconds(keep, len(found)) for bundle, keep in timed])
    return np.array(found[1:])
