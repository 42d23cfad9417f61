"""Measuring a plan's cost without a graph: the eager decoder with rounded weights and inputs.

Weights are the codes that would be written, times their scales; ModelOpt's quantizer rounds inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.ends import Entry, Exit
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.quantization.linear import quantize_layer
from gsx_exporter.quantization.plan import QuantizationPlan
from gsx_exporter.quantization.scheme import EMBEDDING, HEAD
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class Cost:
    """What rounding costs on a text, against the same model in float32.

    Args:
        divergence: KL divergence of each token's next-token distribution, in nats: one array [S] for each window.
        same: whether each token's most likely next token is the same, [S] bool.
        nats: increase of the loss of each token but the first, [S - 1]; negative where it fell.
        exact_nats: the loss of the model itself, [S - 1].
        flipped: share of keep/skip decisions that flipped; 0 without decisions.
    """

    divergence: tuple[np.ndarray, ...]
    same: tuple[np.ndarray, ...]
    nats: tuple[np.ndarray, ...]
    exact_nats: tuple[np.ndarray, ...]
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
        self.checkpoint, self.text = checkpoint, text
        self._options, self._controls = options, controls
        self._on_progress = on_progress
        self._walk, self._keep, self._stream = self._run(checkpoint, None, "measuring in full precision")

    def cost(self, plan: QuantizationPlan) -> Cost:
        """The plan's cost."""
        walk, kept, stream = self._run(plan.checkpoint, plan, "measuring what rounding costs")
        different = decisions = 0
        for exact, rounded in zip(self._keep, kept, strict=True):
            different += sum(int((exact[branch] != keep).sum()) for branch, keep in rounded.items())
            decisions += sum(keep.numel() for keep in exact.values())
        divergence, same, nats, exact_nats = [], [], [], []
        with torch.inference_mode():
            # The head runs again on the exact states: its logits would take more memory than all else.
            pairs = zip(self._walk.logits(self._stream), walk.logits(stream), strict=True)
            for (ids, wanted_logits), (_, found_logits) in pairs:
                wanted, found = (F.log_softmax(logits, dim=-1) for logits in (wanted_logits, found_logits))
                divergence += list((wanted.exp() * (wanted - found)).sum(dim=-1).double().numpy())
                same += list((wanted.argmax(dim=-1) == found.argmax(dim=-1)).numpy())
                loss, rounded_loss = (_loss(one, ids) for one in (wanted, found))
                nats += list((rounded_loss - loss).numpy())
                exact_nats += list(loss.numpy())
        flipped = different / decisions if decisions else 0.0
        return Cost(tuple(divergence), tuple(same), tuple(nats), tuple(exact_nats), flipped)

    def _run(
        self, checkpoint: Checkpoint, plan: QuantizationPlan | None, what: str
    ) -> tuple[Walk, list[dict[Branch, Tensor]], Stream]:
        """The text through the model, quantized if there is a plan: the walk, the kept rows of each layer, the end."""
        with torch.inference_mode():
            walk = Walk(checkpoint, self.text.ids, self._options, _nothing if plan is None else _tables(plan))
            stream = walk.stream(self._controls)
            kept = []
            for number, layer in walk.layers():
                if plan is not None:
                    quantize_layer(layer, number, plan)
                kept.append(walk.through(number, layer, stream))
                self._on_progress(Progress(what, number + 1, checkpoint.config.num_layers))
        return walk, kept, stream


def _loss(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """[m, S, V], [m, S] -> [m, S - 1] float64."""
    return -log_probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double()


def _nothing(end: Entry | Exit) -> None:
    """The tables of the model itself."""


def _tables(plan: QuantizationPlan) -> Callable[[Entry | Exit], None]:
    """Round the tables as a plan says."""

    def rounded(name: str, table: Tensor) -> Tensor:
        return plan.encoded(name, table, torch.float32).decoded()

    def quantize(end: Entry | Exit) -> None:
        if EMBEDDING in plan.matrices and (isinstance(end, Entry) or end.tied):
            end.embed_tokens.data = rounded(EMBEDDING, end.embed_tokens.t()).t()
        elif isinstance(end, Exit) and HEAD in plan.matrices:
            end.lm_head.weight.data = rounded(HEAD, end.lm_head.weight)

    return quantize
