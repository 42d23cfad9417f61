"""A bundle in a process of its own (`process.py`): times prompts and the tokens after them.

    python -m gsx.benchmarking.worker '{"bundle": DIR, "threads": 2}'

Needs neither torch nor transformers, so that the peak memory is the bundle's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from gsx.backends import open_backend
from gsx.benchmarking.machine import peak_mb
from gsx.benchmarking.process import serve
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues
from gsx_engines.bundle.cost import Work, work_of
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.generation.generate import generate
from gsx_engines.runners.base import Cache, Logits, Runner, StepOutput
from gsx_engines.runners.select import open_runner
from gsx_engines.speculation.draft import open_draft

# The first call after a pause is slower, whatever the model: it is made with so many new tokens, and not timed.
WARM_UP_TOKENS = 2
COUNTS = ("flops", "bytes", "prompt_kept", "kept")


class Counted:
    """A runner that remembers how many rows each branch ran on, call by call."""

    def __init__(self, runner: Runner) -> None:
        self.manifest, self.counts_tokens = runner.manifest, runner.counts_tokens
        self.new_cache, self.copy = runner.new_cache, runner.copy
        self._runner = runner
        self.skippable = np.zeros((self.manifest.decoder.num_layers, len(BRANCHES)), bool)
        for layer, branch in self.manifest.skippable_places:
            self.skippable[layer, BRANCHES.index(branch)] = True
        self.rows: list[np.ndarray] = []

    def step(
        self,
        cache: Cache,
        input_ids: np.ndarray,
        controls: RuntimeValues,
        *,
        counts: list[int] | None = None,
        logits: Logits = "last",
    ) -> StepOutput:
        """See `Runner`."""
        output = self._runner.step(cache, input_ids, controls, counts=counts, logits=logits)
        rows = np.full(self.skippable.shape, input_ids.size)
        if output.kept is not None:
            rows[self.skippable] = output.kept[self.skippable]  # others always run
        self.rows.append(rows)
        return output


def load(spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Open a bundle.

    Args:
        spec: `bundle`, its directory; `threads`, `backend`, `device` as for `gsx.generate`; `draft`: whether to draft
            as the bundle does.
    Returns: what answers a request: `prompts`, token ids of one length; `new_tokens`; `keep`, fields of `KeepSettings`.
        An answer has seconds to the `first` token and for each of the later ones (`token`), the new `tokens`, tokens in
        a verification (`accepted`, null without a draft), the process's `peak_mb` so far; and, counted in plain
        decoding, else null: floating-point operations of the prompts (`flops`), mean `bytes` of a step, and the shares
        of skippable work kept in prompts and steps (`prompt_kept` and `kept`; null for a dense model).
    """
    bundle = open_bundle(spec["bundle"])
    threads = spec.get("threads")
    backend = open_backend(spec.get("backend", "onnxruntime"), spec.get("device"), threads)
    draft = None
    if spec.get("draft") and bundle.manifest.draft is not None:
        draft = open_draft(bundle, bundle.manifest.draft.draft, threads, backend)
    runner: Runner = draft.runner if draft else Counted(open_runner(bundle, threads, backend))
    work = work_of(bundle)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompts, new_tokens = request["prompts"], request["new_tokens"]
        options: dict[str, Any] = {"keep": KeepSettings(**request["keep"]), "stop_ids": [], "draft": draft}
        generate(runner, prompts, max_new_tokens=min(WARM_UP_TOKENS, new_tokens), **options)
        if isinstance(runner, Counted):
            runner.rows.clear()
        found = generate(runner, prompts, max_new_tokens=new_tokens, **options)
        stats = found.stats
        later = (stats.new_tokens - stats.sequences) / stats.sequences
        return {
            "first": stats.prefill_seconds,
            "token": stats.decode_seconds / later if later else None,
            "tokens": [one.tokens for one in found.sequences],
            "accepted": stats.tokens_per_verification if draft else None,
            "peak_mb": peak_mb(),
            **(_counts(work, runner, prompts) if isinstance(runner, Counted) else dict.fromkeys(COUNTS)),
        }

    return answer


def _counts(work: Work, runner: Counted, prompts: list[list[int]]) -> dict[str, float | None]:
    """What the calls of an answer did: the first one read prompts, the others a token of each sequence."""
    batch, length = len(prompts), len(prompts[0])
    first, *steps = runner.rows
    read = [work.step_bytes(rows, length + number + 1) for number, rows in enumerate(steps)]
    gated = runner.skippable
    values = (
        work.prompt_flops(first, batch, length),
        float(np.mean(read)) if steps else None,
        float(first[gated].mean()) / (batch * length) if gated.any() else None,
        float(np.mean([rows[gated] for rows in steps])) / batch if gated.any() and steps else None,
    )
    return dict(zip(COUNTS, values, strict=True))


if __name__ == "__main__":
    serve(lambda: load(json.loads(sys.argv[1])))
