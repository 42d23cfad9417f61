"""Trying drafts on a text that the model has written, without generating it again.

The model continues prompts once. A draft is then given the text up to some position, with the model's own K/V, and
reads the next tokens of the text in one call. The number of its first choices in a row that match the text is the
number of tokens that a verification would have accepted there. This takes one call of a few rows for each position and
is reproducible, unlike the time of a speculative run (benchmarks/RESULTS.md, skip-set drafts).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gsx_engines.bundle.controls import controls_for
from gsx_engines.bundle.drafts import LayersDraft
from gsx_engines.generation.generate import generate
from gsx_engines.runners.base import Runner
from gsx_engines.speculation.draft import draft_controls
from gsx_engines.speculation.length import CHUNK


class Replay:
    """Greedy continuations of prompts at the exported budget, to try drafts on.

    Args:
        runner: the model.
        prompts: token ids.
        new_tokens: how many to write after each prompt, CHUNK or more.
    """

    def __init__(self, runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self._runner, self._controls = runner, controls_for(runner.manifest)
        self._texts = []
        for prompt in prompts:
            written = generate(runner, [prompt], max_new_tokens=new_tokens, stop_ids=[]).sequences[0].tokens
            tokens = np.array([[*prompt, *written]])
            cache = runner.new_cache(1, tokens.shape[1])
            runner.step(cache, tokens[:, : len(prompt)], self._controls, logits="none")
            self._texts.append((len(prompt), tokens, cache))

    def accepted(self, draft: LayersDraft) -> np.ndarray:
        """How many tokens in a row a draft gets right, from each position on.

        Args:
            draft: the branches that it leaves out.
        Returns: [positions] int64, 0 to CHUNK.
        """
        found = []
        controls = draft_controls(draft, self._runner.manifest, self._controls)
        for first, tokens, cache in self._texts:
            cache.roll_back([first])
            self._runner.step(cache, tokens[:, first:], self._controls, logits="none")
            # From the last position to the first: what a draft leaves in the cache is after all that is still read.
            for start in reversed(range(first, tokens.shape[1] - CHUNK, CHUNK)):
                cache.roll_back([start])
                output = self._runner.step(cache, tokens[:, start : start + CHUNK], controls, logits="all")
                right = output.logits[0].argmax(axis=-1) == tokens[0, start + 1 : start + CHUNK + 1]
                found.append(int(np.logical_and.accumulate(right).sum()))
        return np.array(found, np.int64)
