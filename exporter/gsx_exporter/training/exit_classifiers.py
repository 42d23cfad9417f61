"""CALM's early-exit classifiers: after an exit, the probability that the layers above do not change the next token.

The model is frozen. A token's label at an exit is whether the most likely next token there, by the model's own norm and
head, is that of the whole model. Each exit has its own logistic regression on the state after its layer: the paper's
independent objective (arXiv:2207.07061 section 3.5; the released code's `loss_fn_meta_cls`), in which tokens that may
exit and tokens that may not have the same total weight, however many there are of each. The problem is convex, so it is
solved (L-BFGS over all tokens) and not trained step by step, and the same text gives the same classifier.

The released code shares one classifier between all layers. With one for each exit, none has to fit states of several
depths, and a shared classifier can still be stored as equal tensors. Facts: docs/methods.md section 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsx_engines.bundle.bundle import writing
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import EXIT_CLASSIFIER
from gsx_exporter.convert import SLACK_BYTES
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.defaults import CLASSIFIER_TOKENS
from gsx_exporter.training.frozen import learnt_windows, text_windows, write_with
from gsx_exporter.training.logistic import logistic_regression, ranking
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class ExitClassifier:
    """The classifier of one exit.

    Args:
        depth: number of layers before it.
        weight, bias: [1, H], [1] float32.
        agreement: share of the held-out tokens whose next token here is the whole model's.
        ranking: probability that a held-out token that may exit scores higher than one that may not (area under the
            ROC curve); 0.5 is a guess. NaN if the held-out tokens all have the same label.
    """

    depth: int
    weight: Tensor
    bias: Tensor
    agreement: float
    ranking: float


@dataclass(frozen=True)
class ClassifierResult:
    """A checkpoint with classifiers.

    Args:
        directory: where it is stored.
        tokens: number of tokens of the text, including held-out ones.
        exits: the classifiers, in the order of depth.
    """

    directory: Path
    tokens: int
    exits: tuple[ExitClassifier, ...]


def train_exit_classifiers(
    model: str | Path,
    out: str | Path,
    *,
    depths: Sequence[int] | None = None,
    text: str | Path | None = None,
    tokens: int = CLASSIFIER_TOKENS,
    on_progress: OnProgress = silent,
) -> ClassifierResult:
    """Fit a classifier for each exit of a checkpoint, and write the checkpoint with them.

    Args:
        model: a directory or a hub id; its weights are not changed.
        out: the new checkpoint's directory, which must be new or empty; it is written completely or not at all.
        depths: the exits; None for those that the checkpoint lists.
        text: a directory of text files; None for the standard library of the running Python.
        tokens: largest number of tokens of the text to use.
        on_progress: called before each step.
    Returns: the checkpoint's directory, and how well each classifier predicts the model on held-out tokens.
    Raises:
        UsageError: out is not empty; the model has no exits or not these; or all tokens have the same label at an exit.
        CheckpointError, TextError: model or text cannot be used.
    Example:
        >>> result = gsx.train_exit_classifiers("my-model", "out/with-classifiers", text="my-texts", tokens=8192)
        >>> [one.depth for one in result.exits]
        [1, 2]
    """
    out = Path(out)
    on_progress(Progress("checking the checkpoint"))
    checkpoint = open_checkpoint(model)
    if checkpoint.config.loops is not None:
        raise UsageError(
            "exit classifiers are not trained for looped models",
            expected="a model whose layers run once",
            found=f"{checkpoint.config.family}, {checkpoint.source}",
            todo="gsx train --exit-gate fits Ouro's own gate, which decides between loops"
            if checkpoint.config.loop_gate
            else None,
        )
    exits = _exits(checkpoint, depths)
    with writing(out, overwrite=False, needed_bytes=checkpoint.weight_bytes() + SLACK_BYTES) as work:
        on_progress(Progress("reading the text"))
        ids = text_windows(checkpoint, None if text is None else Path(text), tokens)
        found = fit_exit_classifiers(checkpoint, ids, exits, on_progress)
        _write(checkpoint, found, work, on_progress)
    return ClassifierResult(out, int(ids.size), found)


def fit_exit_classifiers(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    depths: Sequence[int],
    on_progress: OnProgress = silent,
) -> tuple[ExitClassifier, ...]:
    """Fit one classifier for each exit, in two passes over a text; one layer's states are in memory at a time.

    Args:
        checkpoint: the model.
        ids: [M, S] int64, without padding; the last windows are held out.
        depths: the exits, ascending.
        on_progress: called before each layer.
    Raises:
        UsageError: an exit agrees with the model at every token, or at no token.
    """
    walk = Walk(checkpoint, ids, DecoderOptions())
    layers = checkpoint.config.num_layers
    total = layers + depths[-1]
    next_tokens: dict[int, Tensor] = {}
    fitted = []
    fit_on = learnt_windows(len(ids)) * ids.shape[1]
    with torch.inference_mode():
        stream = walk.stream({})
        for number, layer in walk.layers():
            on_progress(Progress("computing the exits' next tokens", number, total))
            walk.through(number, layer, stream)
            if number + 1 in (*depths, layers):
                found = [logits.argmax(dim=-1).flatten() for _, logits in walk.logits(stream)]
                next_tokens[number + 1] = torch.cat(found)
        stream = walk.stream({})
    for number, layer in walk.layers():
        on_progress(Progress("fitting", layers + number, total))
        with torch.inference_mode():
            walk.through(number, layer, stream)
        depth = number + 1
        if depth in depths:
            agrees = next_tokens[depth] == next_tokens[layers]
            weight, bias = _fit(stream.hidden[:fit_on].clone(), agrees[:fit_on].clone(), depth)
            held, labels = stream.hidden[fit_on:], agrees[fit_on:]
            scores = (held @ weight.t() + bias)[:, 0]
            fitted.append(ExitClassifier(depth, weight, bias, float(labels.float().mean()), ranking(scores, labels)))
        if depth == depths[-1]:
            break
    return tuple(fitted)


def _fit(states: Tensor, agrees: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Balanced logistic regression: states [N, H], labels [N] bool -> weight [1, H], bias [1]."""
    share = float(agrees.float().mean())
    if share in (0.0, 1.0):
        raise UsageError(
            f"exit {depth}: there is nothing to learn",
            expected="tokens at which the exit and the whole model agree, and tokens at which they differ",
            found=f"its next token is {'always' if share else 'never'} the whole model's, on {len(agrees)} tokens",
            todo="give more text, or leave this exit out",
        )
    # Weights as in the released code: 1 minus the share of tokens with the same label.
    return logistic_regression(states, agrees.float(), torch.where(agrees, 1 - share, share))


def _exits(checkpoint: Checkpoint, depths: Sequence[int] | None) -> list[int]:
    config = checkpoint.config
    if config.router is not None:
        raise UsageError("the checkpoint has routers, which decide what runs", expected="a checkpoint without routers")
    wanted = [depth for depth in config.exits if depth < config.num_layers] if depths is None else depths
    if not wanted:
        raise UsageError(
            "the checkpoint lists no exits",
            expected='"exits" in the "gsx" section of config.json, below the last layer',
            todo="give the depths: --exit-classifiers 4,8",
        )
    outside = [depth for depth in wanted if not 0 < depth < config.num_layers]
    if outside:
        raise UsageError(
            "exits are outside the model",
            expected=f"depths from 1 to {config.num_layers - 1}",
            found=", ".join(map(str, outside)),
        )
    return sorted(set(wanted))


def _write(checkpoint: Checkpoint, found: Sequence[ExitClassifier], work: Path, on_progress: OnProgress) -> None:
    """Write the checkpoint with these classifiers, without those that it may have had before."""
    own: dict[str, Tensor] = {}
    for one in found:
        prefix = f"model.layers.{one.depth - 1}.{EXIT_CLASSIFIER}"
        own |= {f"{prefix}.weight": one.weight.contiguous(), f"{prefix}.bias": one.bias}
    section = {"exit_classifiers": [one.depth for one in found]}
    write_with(checkpoint, own, work, on_progress, section=section, without=f".{EXIT_CLASSIFIER}.")
