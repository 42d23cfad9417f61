"""A runner with a single stage that holds all layers."""

from __future__ import annotations

import numpy as np

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.runners.base import Cache, Logits, Stage, StepOutput, call_of, grown, new_cache, step_output


class WholeRunner:
    """Runs `model.onnx`, or an engine built from it; see `Runner`."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.manifest = stage.manifest
        self.counts_tokens = stage.counts_tokens

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See `Runner`."""
        return new_cache(batch, capacity, self.stage.new_memory(batch, capacity))

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
        call = call_of(cache, input_ids, counts, controls)
        output = self.stage.run(cache.memory, call, None, logits)
        cache.lengths = cache.verified = grown(call.lengths, call.counts)
        return step_output(self.stage, call, output)

    def copy(self, cache: Cache, source: int, target: int, length: int) -> None:
        """See `Runner`."""
        self.stage.copy(cache.memory, source, target, length)
        cache.copy(source, target, length)
