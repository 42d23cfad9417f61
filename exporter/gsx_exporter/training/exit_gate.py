"""Ouro's exit gate: after each loop, the probability that a token should leave (arXiv:2510.25741, stage II).

The model is frozen. A token should go on after a loop if the next loop lowers the loss of its next token. With I that
gain in nats, or 0 if the loss rises, the label of going on is sigmoid(k (I - gamma)); k = 50 and gamma = 0.005 as
published. The gate, one for all loops, learns it by cross-entropy. Two things differ from the paper. It pairs the state
after loop t with the gain of loop t itself, from the second loop on; here the gate after loop t learns the gain of loop
t + 1, on which it decides, and so after the first loop too. And the problem is convex, so it is solved, not trained.

The rule that reads the gate is `--policy calm:gate`. Facts: docs/methods.md section 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gsx_engines.bundle.bundle import writing
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import LOOP_GATE
from gsx_exporter.convert import SLACK_BYTES
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.loading import load_final_norm
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.defaults import CLASSIFIER_TOKENS
from gsx_exporter.training.frozen import learnt_windows, text_windows, write_with
from gsx_exporter.training.logistic import logistic_regression, ranking
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# As published: how sharply a gain separates going on from leaving, and the gain in nats at which both are as good.
SHARPNESS, LEAST_GAIN = 50.0, 0.005


@dataclass(frozen=True)
class LoopGain:
    """A loop and the gate after it, on held-out tokens.

    Args:
        loops: how many loops have run.
        loss: nats a token, of the model's next token after them.
        helped: share of the tokens that another loop helps; NaN after the last.
        leaving: mean probability of leaving now, of a token that is still there; NaN after the last.
        ranking: probability that a token that another loop does not help is likelier to leave than one that it helps;
            0.5 is a guess. NaN after the last loop, and if all tokens are of one kind.
    """

    loops: int
    loss: float
    helped: float
    leaving: float
    ranking: float


@dataclass(frozen=True)
class ExitGate:
    """A gate.

    Args:
        weight, bias: [1, H], [1] float32.
        gains: of each number of loops, ascending.
    """

    weight: Tensor
    bias: Tensor
    gains: tuple[LoopGain, ...]


@dataclass(frozen=True)
class ExitGateResult:
    """A checkpoint with a gate that was fitted to it.

    Args:
        directory: where it is stored.
        tokens: number of tokens of the text, including held-out ones.
        gains: what each loop brings, and what the gate makes of it, on held-out tokens.
    """

    directory: Path
    tokens: int
    gains: tuple[LoopGain, ...]


def train_exit_gate(
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = CLASSIFIER_TOKENS,
    on_progress: OnProgress = silent,
) -> ExitGateResult:
    """Fit the exit gate of a looped model, and write the checkpoint with it.

    Args:
        model: a directory or a hub id; its other weights are not changed.
        out: the new checkpoint's directory, which must be new or empty; it is written completely or not at all.
        text: a directory of text files; None for the standard library of the running Python.
        tokens: largest number of tokens of the text to use.
        on_progress: called before each step.
    Returns: the checkpoint's directory, what each loop brings, and how well the gate tells it, on held-out tokens.
    Raises:
        UsageError: out is not empty; or the model has no exit gate, or a single loop.
        CheckpointError, TextError: model or text cannot be used.
    Example:
        >>> result = gsx.train_exit_gate("my-ouro", "out/with-gate", text="my-texts", tokens=8192)
        >>> [one.loops for one in result.gains]
        [1, 2, 3, 4]
    """
    out = Path(out)
    on_progress(Progress("checking the checkpoint"))
    checkpoint = open_checkpoint(model)
    loops = checkpoint.config.loops
    if not checkpoint.config.loop_gate or loops is None or loops.most < 2:
        raise UsageError(
            f"{checkpoint.source}: has no exit gate between loops",
            expected="a looped model with an exit gate and at least 2 loops (Ouro)",
            found=f"{checkpoint.config.family}" + (f" with {loops.most} loops" if loops else ""),
            todo="other models have gates of layers (--recipe gateskip) or exits (--exit-classifiers)",
        )
    with writing(out, overwrite=False, needed_bytes=checkpoint.weight_bytes() + SLACK_BYTES) as work:
        on_progress(Progress("reading the text"))
        ids = text_windows(checkpoint, None if text is None else Path(text), tokens)
        found = fit_exit_gate(checkpoint, ids, on_progress)
        own = {f"model.{LOOP_GATE}.weight": found.weight.contiguous(), f"model.{LOOP_GATE}.bias": found.bias}
        write_with(checkpoint, own, work, on_progress)
    return ExitGateResult(out, int(ids.size), found.gains)


def fit_exit_gate(checkpoint: Checkpoint, ids: np.ndarray, on_progress: OnProgress = silent) -> ExitGate:
    """Fit the gate in one pass over a text. In memory are one layer's weights, and the states after each loop.

    Args:
        checkpoint: a looped model with an exit gate.
        ids: [M, S] int64, without padding; the last windows are held out.
        on_progress: called before each visit of a layer.
    """
    loops = checkpoint.config.loops
    assert loops is not None
    states, losses = list[Tensor](), list[Tensor]()
    with torch.inference_mode():
        walk = Walk(checkpoint, ids, DecoderOptions())
        norm = load_final_norm(checkpoint, walk.options)
        stream = walk.stream({})
        for number, layer in walk.layers():
            on_progress(Progress("running the loops", number, len(loops.visits)))
            walk.through(number, layer, stream)
            if number + 1 in (*loops.ends, len(loops.visits)):
                losses.append(torch.cat([_losses(*found) for found in walk.logits(stream)]))
                # The last token of a window has no next one.
                states.append(norm(stream.hidden).view(*ids.shape, -1)[:, :-1].flatten(0, 1))
    on_progress(Progress("fitting"))
    return _fit(states[:-1], losses, learnt_windows(len(ids)) * (ids.shape[1] - 1))


def _losses(ids: Tensor, logits: Tensor) -> Tensor:
    """Nats of the next tokens. ids: [m, S]; logits: [m, S, V]. Returns: [m (S - 1)]."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def going_on(losses: Sequence[Tensor]) -> list[Tensor]:
    """The labels of going on after each loop but the last, [N] each, from 0 to 1.

    Args: losses: nats of the next tokens after each loop, [N] each.
    """
    gains = [(before - after).clamp(min=0) for before, after in pairwise(losses)]
    return [torch.sigmoid(SHARPNESS * (gain - LEAST_GAIN)) for gain in gains]


def _fit(states: Sequence[Tensor], losses: Sequence[Tensor], learnt: int) -> ExitGate:
    """states: what each loop but the last gives, [N, H]; losses: after each loop, [N]; learnt: tokens to learn from."""
    labels = going_on(losses)
    leave = torch.cat([1 - label[:learnt] for label in labels])
    weight, bias = logistic_regression(torch.cat([one[:learnt] for one in states]), leave)
    gains = []
    for number, loss in enumerate(losses):
        nats, nan = float(loss[learnt:].mean()), float("nan")
        if number == len(losses) - 1:
            gains.append(LoopGain(number + 1, nats, nan, nan, nan))
            continue
        scores = (states[number][learnt:] @ weight.t() + bias)[:, 0]
        helped = labels[number][learnt:] > 0.5
        share, leaving = float(helped.float().mean()), float(scores.sigmoid().mean())
        gains.append(LoopGain(number + 1, nats, share, leaving, ranking(scores, ~helped)))
    return ExitGate(weight, bias, tuple(gains))
