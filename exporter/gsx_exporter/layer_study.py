"""What skipping whole layers costs: early exits compared with skipped layers, and how few layers each sequence needs.

The questions come from "Dynamic layer selection in decoder-only transformers" (arXiv 2410.20022). At the same number of
layers, is it better to exit early or to skip layers in between? And how few layers would predict each sequence as well
as the whole model does? The second is an oracle: it knows the loss, so it bounds what any method that picks one set of
layers per sequence can save.

A set of layers stays the same for a whole sequence, so a skipped layer has no K and V, and nothing reads them. In a
looped model the sets are those that it was made for: the visits of the first n loops, with the layers around them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gsx_engines.bundle.layer_sets import unified_places
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.evaluation import losses
from gsx_exporter.rules.loops.traced import LoopCount
from gsx_plugins.progress import OnProgress, Progress, silent

# Ways to pick n layers: the first n; n evenly spaced ones, with the first and the last (Unified Layer Skipping); those
# left when the layer whose removal costs least is removed again and again. In a looped model, the visits of n loops.
Family = Literal["exit", "even", "greedy", "loops"]
FAMILIES: tuple[Family, ...] = ("exit", "even", "greedy")

LayerSet = tuple[int, ...]

# With a limit of time, as many sequences are read as it allows, and these at least.
_FEWEST_SEQUENCES = 4
# A set's share of the time of the whole model: many layers are left out, and states in common are computed once.
_USUAL_WORK = 0.4


@dataclass(frozen=True)
class SetResult:
    """A set of layers, and the loss when only these run: mean nats per predicted token of each sequence, [M] float64.

    Args:
        family: how the set was picked.
        kept: the layers that run, ascending.
        nats: the losses.
    """

    family: Family
    kept: LayerSet
    nats: np.ndarray


@dataclass(frozen=True)
class Oracle:
    """The fewest layers that each sequence needs, among the sets that were tried.

    Args:
        tolerance: nats per token by which a sequence's loss may exceed the whole model's.
        layers: [M] int64, size of the smallest such set for each sequence; the number of all layers if no set does.
        share: mean of `layers`, as a share of all layers.
    """

    tolerance: float
    layers: np.ndarray
    share: float


class LayerSets:
    """Losses of a text under sets of layers.

    States that two sets have in common are computed once. All weights stay in memory.

    Args:
        checkpoint: gated or dense; gates multiply the branches' outputs, but skip nothing.
        ids: [M, S] int64.
    """

    def __init__(self, checkpoint: Checkpoint, ids: np.ndarray) -> None:
        self.depth = checkpoint.config.num_layers
        self._walk = Walk(checkpoint, ids, DecoderOptions())
        with torch.inference_mode():
            self._layers = [self._walk.layer(number) for number in range(self.depth)]
            self._states: dict[LayerSet, Tensor] = {(): self._walk.stream({}).hidden}

    def nats(self, kept: LayerSet) -> np.ndarray:
        """Mean loss of each sequence, [M] float64, when only these layers (ascending) run."""
        with torch.inference_mode():
            known = max(n for n in range(len(kept) + 1) if kept[:n] in self._states)
            stream = Stream({}, {}, self._states[kept[:known]])
            for number in kept[known:]:
                self._walk.through(number, self._layers[number], stream)
            found = [losses(logits.numpy(), ids.numpy()).mean(axis=-1) for ids, logits in self._walk.logits(stream)]
        return np.concatenate(found)

    def remember(self, kept: LayerSet) -> None:
        """Cache the states after each layer of a set, and drop all others."""
        with torch.inference_mode():
            states: dict[LayerSet, Tensor] = {(): self._states[()]}
            stream = Stream({}, {}, states[()])
            for count, number in enumerate(kept):
                known = self._states.get(kept[: count + 1])
                if known is None:
                    self._walk.through(number, self._layers[number], stream)
                else:
                    stream.hidden = known
                states[kept[: count + 1]] = stream.hidden
        self._states = states


def study(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    on_progress: OnProgress = silent,
    seconds: float = math.inf,
) -> list[SetResult]:
    """Losses of every family at every number of layers.

    Args:
        checkpoint: gated or dense.
        ids: [M, S] int64, sequences.
        on_progress: called before each set.
        seconds: how long it may take. The first sequences are read, as many as this allows; if it still ends too soon,
            the greedy sets end before one layer.
    Returns: the whole model first, as `greedy`; then by family, from many layers to few.
    """
    ends = time.monotonic() + seconds
    depth, done = checkpoint.config.num_layers, 0
    whole = tuple(range(depth))
    # All exits except the whole model, even sets from 2 layers up, and the sets that the greedy search tries.
    total = 1 + (depth - 1) + max(depth - 2, 0) + sum(range(2, depth + 1))
    if math.isfinite(seconds):
        ids = ids[: _sequences(checkpoint, ids, (ends - time.monotonic()) / (total * _USUAL_WORK))]
    sets = LayerSets(checkpoint, ids)

    def nats(kept: LayerSet) -> np.ndarray:
        nonlocal done
        done += 1
        on_progress(Progress("trying sets of layers", done, total))
        return sets.nats(kept)

    sets.remember(whole)
    found = [SetResult("greedy", whole, nats(whole))]
    found += [SetResult("exit", whole[:n], nats(whole[:n])) for n in range(depth - 1, 0, -1)]
    for n in range(depth - 1, 1, -1):
        even = tuple(dict.fromkeys(layer for layer, _ in unified_places(depth, depth / n)))
        found.append(SetResult("even", even, nats(even)))
    removals = _removals(sets, whole, nats)
    while time.monotonic() < ends and (best := next(removals, None)) is not None:
        found.append(best)
    return found


def study_loops(
    checkpoint: Checkpoint, ids: np.ndarray, on_progress: OnProgress = silent, seconds: float = math.inf
) -> list[SetResult]:
    """Losses of a looped model at every number of loops.

    Args: as for `study`.
    Returns: a result for each number of loops, all of them first; its layers are visits.
    """
    if math.isfinite(seconds):
        few = ids[:_FEWEST_SEQUENCES]
        began = time.monotonic()
        _nats_by_loops(checkpoint, few, silent)
        ids = ids[: max(len(few), int(len(few) * seconds / (time.monotonic() - began)) - len(few))]
    loops, found = checkpoint.config.loops, _nats_by_loops(checkpoint, ids, on_progress)
    assert loops is not None
    return [SetResult("loops", loops.run_by(count), nats) for count, nats in found.items()]


def _nats_by_loops(checkpoint: Checkpoint, ids: np.ndarray, on_progress: OnProgress) -> dict[int, np.ndarray]:
    """The mean loss of each sequence by number of loops, all of them first; one layer's weights are in memory."""
    loops = checkpoint.config.loops
    assert loops is not None
    # A sequence keeps its number of loops, so only a cache that the loops share needs K and V of a loop left out.
    options = DecoderOptions(LoopCount(loops), "copy" if loops.share_caches else "none")
    walk, total = Walk(checkpoint, ids, options), len(loops.visits)
    found = {}
    with torch.inference_mode():
        streams = {count: walk.stream({"loops": np.array([count])}) for count in range(loops.most, 0, -1)}
        for number, layer in walk.layers():
            on_progress(Progress("running the loops", number, total))
            for stream in streams.values():
                walk.through(number, layer, stream)
        for count, stream in streams.items():
            nats = [losses(logits.numpy(), rows.numpy()).mean(axis=-1) for rows, logits in walk.logits(stream)]
            found[count] = np.concatenate(nats)
    return found


def least_harm(
    checkpoint: Checkpoint, ids: np.ndarray, on_progress: OnProgress = silent, seconds: float = math.inf
) -> Iterator[SetResult]:
    """The whole model, then the sets that are left when the layer whose removal costs least is removed again and again.

    Args: as for `study`. A set is searched when it is asked for; when the time is up, there are no more.
    """
    ends = time.monotonic() + seconds
    sets = LayerSets(checkpoint, ids)
    whole = tuple(range(sets.depth))
    tried = 0

    def nats(kept: LayerSet) -> np.ndarray:
        nonlocal tried
        on_progress(Progress(f"trying sets of {len(kept)} layers", tried % sets.depth, sets.depth))
        tried += 1
        return sets.nats(kept)

    sets.remember(whole)
    yield SetResult("greedy", whole, nats(whole))
    yield from _removals(sets, whole, nats, ends)


def _removals(
    sets: LayerSets, kept: LayerSet, nats: Callable[[LayerSet], np.ndarray], ends: float = math.inf
) -> Iterator[SetResult]:
    """Sets with one layer fewer each, down to one layer.

    Args: kept: the set to begin with; nats: measures a set; ends: on the monotonic clock, when to stop.
    """
    while len(kept) > 1:
        tried = []
        for layer in kept:
            if time.monotonic() > ends:
                return
            other = _without(kept, layer)
            tried.append(SetResult("greedy", other, nats(other)))
        best = min(tried, key=lambda one: float(one.nats.mean()))
        kept = best.kept
        sets.remember(kept)
        yield best


def _sequences(checkpoint: Checkpoint, ids: np.ndarray, seconds: float) -> int:
    """How many sequences the whole model reads in some seconds."""
    few = ids[:_FEWEST_SEQUENCES]
    sets = LayerSets(checkpoint, few)
    began = time.monotonic()
    sets.nats(tuple(range(sets.depth)))
    return max(len(few), int(len(few) * seconds / (time.monotonic() - began)))


def oracle(found: Sequence[SetResult], tolerance: float, families: Sequence[Family] = FAMILIES) -> Oracle:
    """The fewest layers for each sequence whose loss is at most the whole model's plus a tolerance (nats per token)."""
    whole = found[0]
    depth = len(whole.kept)
    fewest = np.full(len(whole.nats), depth, np.int64)
    for one in found:
        if one.family in families:
            fewest = np.where(one.nats <= whole.nats + tolerance, np.minimum(fewest, len(one.kept)), fewest)
    return Oracle(tolerance, fewest, float(fewest.mean() / depth))


def curves(found: Sequence[SetResult]) -> Mapping[Family, list[tuple[int, float, LayerSet]]]:
    """For each family: number of layers, perplexity and the set, from many layers to few, the whole model first."""
    whole = found[0]

    def point(one: SetResult) -> tuple[int, float, LayerSet]:
        return len(one.kept), float(np.exp(one.nats.mean())), one.kept

    families: Sequence[Family] = ["loops"] if whole.family == "loops" else FAMILIES
    return {f: [point(whole)] + [point(one) for one in found[1:] if one.family == f] for f in families}


def _without(kept: LayerSet, layer: int) -> LayerSet:
    return tuple(other for other in kept if other != layer)
