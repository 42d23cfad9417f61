"""Measuring a plan's cost without a graph: the eager decoder with rounded weights and inputs.

Weights are the codes that would be written, times their scales; ModelOpt's quantizer rounds inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import RoundRows, Stream, Walk
from gsx_exporter.evaluation import NextTokens, next_tokens
from gsx_exporter.quantization.linear import quantize_layer
from gsx_exporter.quantization.plan import QuantizationPlan
from gsx_exporter.quantization.scheme import EMBEDDING, HEAD
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class Cost:
    """What rounding costs on a text, against the same model in float32.

    Args:
        windows: what both say of the next token, window by window.
        flipped: share of keep/skip decisions that flipped; 0 without decisions.
    """

    windows: tuple[NextTokens, ...]
    flipped: float


class Simulation:
    """Compares plans with the float32 model on a text, at one selection. The float32 model is run once.

    Args:
        checkpoint: the model, unquantized.
        text: the text to measure on.
        controls: run-time inputs of the keep rule.
        options: keep rule and K/V policy.
        on_progress: called after each layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: TokenText,
        controls: RuntimeValues,
        options: DecoderOptions,
        on_progress: OnProgress = silent,
    ) -> None:
        self._ids, self._options, self._controls = text.ids, options, controls
        self._on_progress = on_progress
        self._walk, self._keep, self._stream = self._run(checkpoint, None, "measuring in full precision")

    def cost(self, plan: QuantizationPlan) -> Cost:
        """The plan's cost."""
        walk, kept, stream = self._run(plan.checkpoint, plan, "measuring what rounding costs")
        different = decisions = 0
        for exact, rounded in zip(self._keep, kept, strict=True):
            different += sum(int((exact[branch] != keep).sum()) for branch, keep in rounded.items())
            decisions += sum(keep.numel() for keep in exact.values())
        windows: list[NextTokens] = []
        with torch.inference_mode():
            # The head runs again on the exact states: its logits would take more memory than all else.
            pairs = zip(self._walk.logits(self._stream), walk.logits(stream), strict=True)
            for (ids, wanted), (_, found) in pairs:
                sides = (side.numpy() for side in (ids, wanted, found))
                windows += [next_tokens(*one) for one in zip(*sides, strict=True)]
        return Cost(tuple(windows), different / decisions if decisions else 0.0)

    def _run(
        self, checkpoint: Checkpoint, plan: QuantizationPlan | None, what: str
    ) -> tuple[Walk, list[dict[Branch, Tensor]], Stream]:
        """The text through the model, quantized if there is a plan: the walk, the kept rows of each layer, the end."""
        head = EMBEDDING if checkpoint.config.tied_head else HEAD
        with torch.inference_mode():
            walk = Walk(checkpoint, self._ids, self._options, (_rounding(plan, EMBEDDING), _rounding(plan, head)))
            stream = walk.stream(self._controls)
            kept = []
            for number, layer in walk.layers():
                if plan is not None:
                    quantize_layer(layer, number, plan)
                kept.append(walk.through(number, layer, stream))
                self._on_progress(Progress(what, number + 1, checkpoint.config.num_layers))
        return walk, kept, stream


def _rounding(plan: QuantizationPlan | None, table: str) -> RoundRows:
    """How a plan rounds some rows of a table: each row has its scales. As it is without a plan."""

    def rounded(rows: Tensor) -> Callable[[], Tensor] | None:
        if plan is None or table not in plan.matrices:
            return None
        return plan.encoded(table, rows, torch.float32).decoded

    return rounded
