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
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from gsx_engines.bundle.bundle import writing
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.experts import spelling_of
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import EXIT_CLASSIFIER
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.convert import SLACK_BYTES, write_config, write_safetensors
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.defaults import CLASSIFIER_TOKENS
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.text import WINDOW_TOKENS
from gsx_exporter.training.corpus import read_corpus, split
from gsx_exporter.training.tokenizer import encode_documents
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# Share of the text that is held out to evaluate the classifiers.
HELD_OUT = 1 / 8
FEWEST_WINDOWS = 4
# Factor of half the squared weights (for standardized states), added to the mean loss: keeps weights finite even if the
# labels are separable.
PENALTY = 1e-3
_STEPS = 200
_SEED = 0


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
        )
    exits = _exits(checkpoint, depths)
    with writing(out, overwrite=False, needed_bytes=checkpoint.weight_bytes() + SLACK_BYTES) as work:
        on_progress(Progress("reading the text"))
        ids = _windows(checkpoint, None if text is None else Path(text), tokens)
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
    fit_on = (len(ids) - max(1, int(len(ids) * HELD_OUT))) * ids.shape[1]
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
            fitted.append(ExitClassifier(depth, weight, bias, float(labels.float().mean()), _ranking(scores, labels)))
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
    mean, spread = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
    # Weights as in the released code: 1 minus the share of tokens with the same label.
    each = torch.where(agrees, 1 - share, share)
    labels = agrees.float()
    weight, bias = (torch.zeros(size, requires_grad=True) for size in (states.shape[1], 1))
    solver = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        scaled = weight / spread
        scores = states @ scaled + (bias - mean @ scaled)
        found = binary_cross_entropy_with_logits(scores, labels, each, reduction="sum") / each.sum()
        found = found + PENALTY / 2 * weight.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    solver.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scaled = weight / spread
        return scaled[None], bias - mean @ scaled


def _ranking(scores: Tensor, agrees: Tensor) -> float:
    """Area under the ROC curve: scores [N], labels [N] bool."""
    positive = agrees.numpy()
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    ranks = rankdata(scores.numpy())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


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


def _windows(checkpoint: Checkpoint, text: Path | None, tokens: int) -> np.ndarray:
    """Windows [M, S] of the training part of a corpus."""
    documents = split(read_corpus(text))["train"]
    # A random sample of the files; a token rarely has more than 16 characters.
    order = np.random.default_rng(_SEED).permutation(len(documents))
    sizes = np.cumsum([len(documents[n].text) for n in order])
    some = [documents[n] for n in order[: 1 + int(np.searchsorted(sizes, 16 * tokens))]]
    end = next(iter(checkpoint.config.eos_ids), None)
    ids = encode_documents(load_tokenizer(checkpoint), some, end_of_text=end)[:tokens]
    width = min(WINDOW_TOKENS, checkpoint.config.max_positions)
    count = len(ids) // width
    if count < FEWEST_WINDOWS:
        raise TextError(
            "the text is too short to fit exit classifiers",
            expected=f"{FEWEST_WINDOWS * width} tokens or more",
            found=f"{len(ids)} tokens",
        )
    highest = int(ids.max())
    if highest >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.source}: the tokenizer does not fit the model",
            expected=f"token ids below {checkpoint.config.vocab_size}",
            found=str(highest),
        )
    return ids[: count * width].astype(np.int64).reshape(count, width)


def _write(
    checkpoint: Checkpoint,
    found: Sequence[ExitClassifier],
    work: Path,
    on_progress: OnProgress,
) -> None:
    """Write the checkpoint with these classifiers, without those that it may have had before."""
    checkpoint.copy_companions(work)
    own: dict[str, Tensor] = {}
    for one in found:
        prefix = f"model.layers.{one.depth - 1}.{EXIT_CLASSIFIER}"
        own |= {f"{prefix}.weight": one.weight.contiguous(), f"{prefix}.bias": one.bias}
    kept = [name for name in checkpoint.names if f".{EXIT_CLASSIFIER}." not in name]

    def read(name: str) -> Tensor:
        return own[name] if name in own else checkpoint.tensor(name)

    sizes = {name: read(name).numel() * read(name).element_size() for name in (*kept, *own)}
    write_config(checkpoint, {"exit_classifiers": [one.depth for one in found]}, set(), work / CONFIG)
    write_safetensors(work, sizes, read, spelling=spelling_of(checkpoint.config), on_progress=on_progress)
