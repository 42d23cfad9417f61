"""Quality and time of a bundle's settings on ONNX Runtime, as a request sees them.

The first half of a window of text is the prompt, and the rest follows with the prompt's K/V in the cache, so that rules
that run prompts in full do so here. The prompt is timed in one call, and so are single tokens at the window's end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.runners.base import StepOutput
from gsx_engines.runners.select import open_runner
from gsx_exporter.evaluation import losses
from gsx_plugins.progress import OnProgress, Progress

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
    """

    prompt_kept: float
    kept: float
    perplexity: float


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

    def score(self, keep: KeepSettings) -> Score:
        """Run all windows with a setting."""
        controls = controls_for(self.bundle.manifest, keep, [self.prompt_tokens])
        prompts, rests, nats = [], [], []
        for window in self._windows:
            self._cache.roll_back([0])
            prompt, rest = window[None, : self.prompt_tokens], window[None, self.prompt_tokens :]
            prompts.append(self._kept(self._runner.step(self._cache, prompt, controls, logits="none"), prompt))
            output = self._runner.step(self._cache, rest, controls, logits="all")
            rests.append(self._kept(output, rest))
            nats.append(losses(output.logits, rest))
        return Score(float(np.mean(prompts)), float(np.mean(rests)), math.exp(float(np.mean(nats))))

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
