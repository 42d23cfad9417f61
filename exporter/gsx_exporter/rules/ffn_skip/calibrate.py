"""Calibrating FFN-SkipLLM's parameters on a text, from how much each FFN changes a token's state.

The paper gives no numbers for its cold regions, threshold and stride, so they are found here (docs/policies.md):

1. The text is run through the model in full, and every FFN's change, 1 - cosine of the residual stream before and
   after, is recorded for every token.
2. For each stride, the region that may skip is the range of consecutive layers that change states least. It is half as
   long again as the wanted share needs, and never has the first or the last layer. The stride with the lowest loss is
   used.
3. One threshold applies to the whole region. Skipping changes later states, so some thresholds are tried, and those for
   a grid of shares are interpolated; what each of them keeps is counted on the whole text.

Trials read a part of the text, and whatever is tried or counted together shares the layers below the region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from gsx_engines.bundle.controls import RuntimeValues
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.rules.calibration import CalibratedPoint
from gsx_exporter.rules.ffn_skip.traced import FfnSkip
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

STRIDES = (1, 2, 3)
# Length of a region relative to the shortest possible one, so that the threshold can discriminate.
ROOM = 1.5
# Number of thresholds that are tried, from keeping almost all to skipping all that the stride allows.
_TRIED = 6
# Tokens that trials read: strides are compared on the same ones, and the shares of thresholds between those that were
# tried are less certain than such a part of the text makes them.
_TRIAL_TOKENS = 2048
# A change is never negative, so with this threshold every FFN runs; unlike minus infinity, it still records changes.
_NEVER = np.float32(-1.0)


@dataclass(frozen=True)
class FfnRegion:
    """Layers whose FFNs may be skipped, from `first` to `last`, and how many are skipped after one that ran."""

    first: int
    last: int
    stride: int

    def thresholds(self, layers: int, change: float) -> np.ndarray:
        """The rule's thresholds [L, 2] float32. Args: change: the largest one after which FFNs are skipped."""
        table = np.full((layers, 2), -np.inf, np.float32)
        # The last layer's threshold must be finite too, or its FFN could not be skipped; no FFN is skipped after it.
        table[self.first : self.last + 1, 1] = change
        return table


@dataclass(frozen=True)
class Calibrated:
    """The calibrated parameters.

    Args:
        region: layers and stride.
        similarity: [L] float64, mean cosine of the states before and after each FFN when nothing is skipped.
        points: thresholds and what they keep, in descending order of budgets from 1.
    """

    region: FfnRegion
    similarity: np.ndarray
    points: Sequence[CalibratedPoint]


def calibrate_ffn(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    budgets: Sequence[float],
    wanted: float,
    *,
    stride: int | None = None,
    skipping: tuple[int, int] | None = None,
    on_progress: OnProgress = silent,
) -> Calibrated:
    """Find region, stride and thresholds.

    Args:
        checkpoint: the model.
        ids: [M, S] int64, calibration text.
        budgets: shares of all FFNs to keep for which thresholds are wanted; those that cannot be reached are left out.
        wanted: the share that must be reached.
        stride: FFNs that are skipped after one that ran; None to find it.
        skipping: first and last layer that may skip; None to find them.
        on_progress: called as calibration advances.
    Raises:
        UsageError: the region is too short for the wanted share.
    """
    layers = checkpoint.config.num_layers
    part = ids[: max(1, _TRIAL_TOKENS // ids.shape[1])]
    change = _changes(checkpoint, ids, on_progress)
    regions = [
        FfnRegion(*skipping, k) if skipping else _quietest(change, k, wanted)
        for k in ((stride,) if stride else STRIDES)
    ]
    possible = [one for one in regions if _least(one, layers) <= wanted]
    if not possible:
        least = min(_least(one, layers) for one in regions)
        raise UsageError(
            f"FFN-SkipLLM cannot reach budget {wanted:g}",
            expected=f"{math.ceil(least * 1000) / 1000:g} or more with this stride and these layers",
            found=f"{wanted:g}",
            todo="--policy ffn-skip:stride=K,layers=FIRST-LAST with a larger stride or more layers",
        )
    trials = []
    for number, region in enumerate(possible):
        on_progress(Progress("trying strides", number, len(possible)))
        table = region.thresholds(layers, _simulated(change, region, wanted))
        trials.append(_run(checkpoint, part, region, [table], losses=True)[0][1] if len(possible) > 1 else 0.0)
    region = possible[int(np.argmin(trials))]
    on_progress(Progress("calibrating", 0, 2))
    every = sorted({*budgets, wanted, 1.0}, reverse=True)
    points = _points(checkpoint, ids, part, region, change, every, on_progress)
    return Calibrated(region, 1 - change.mean(axis=1), points)


def at_threshold(
    checkpoint: Checkpoint, ids: np.ndarray, region: FfnRegion, cosine: float, on_progress: OnProgress = silent
) -> Calibrated:
    """As `calibrate_ffn`, for a given threshold and region: what the threshold keeps is counted.

    Args: cosine: the threshold; ids [M, S] int64.
    """
    layers = checkpoint.config.num_layers
    change = _changes(checkpoint, ids, on_progress)
    table = region.thresholds(layers, 1 - cosine)
    kept = _run(checkpoint, ids, region, [table])[0][0]
    share = float(kept[:, 1].mean())
    everything = CalibratedPoint(1.0, np.full((layers, 2), -np.inf, np.float32), np.ones((layers, 2)), 1.0)
    points = [everything] if share >= 1 else [everything, CalibratedPoint(share, table, kept, share)]
    return Calibrated(region, 1 - change.mean(axis=1), points)


def _points(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    part: np.ndarray,
    region: FfnRegion,
    change: np.ndarray,
    budgets: Sequence[float],
    on_progress: OnProgress,
) -> list[CalibratedPoint]:
    """The points of the budgets that can be reached. Args: part: of the text, to try thresholds on."""
    layers = len(change)
    inside = change[region.first : region.last + 1]
    tried = [float(np.quantile(inside, q)) for q in np.linspace(0.05, 1.0, _TRIED)]
    found = _run(checkpoint, part, region, [region.thresholds(layers, t) for t in tried])
    on_progress(Progress("calibrating", 1, 2))
    shares = [float(kept[:, 1].mean()) for kept, _ in found]
    # Shares should fall as thresholds rise; where one does not, the lower share before it is used.
    falling = np.minimum.accumulate([1.0, *shares])
    changes = np.array([0.0, *tried])
    reachable = [b for b in budgets if b == 1.0 or falling[-1] <= b]
    tables = [
        np.full((layers, 2), -np.inf, np.float32)
        if budget == 1.0
        else region.thresholds(layers, float(np.interp(-budget, -falling, changes)))
        for budget in reachable
    ]
    counted = iter(_run(checkpoint, ids, region, [t for b, t in zip(reachable, tables, strict=True) if b < 1.0]))
    points = []
    for budget, table in zip(reachable, tables, strict=True):
        kept = next(counted)[0] if budget < 1.0 else np.ones((layers, 2))
        points.append(CalibratedPoint(budget, table, kept, float(kept[:, 1].mean())))
    return points


def _changes(checkpoint: Checkpoint, ids: np.ndarray, on_progress: OnProgress) -> np.ndarray:
    """1 - cosine of the states before and after every FFN when nothing is skipped: [L, N] float64."""
    layers = checkpoint.config.num_layers
    table = np.full((layers, 2), _NEVER, np.float32)
    found = []
    with torch.inference_mode():
        walk = Walk(checkpoint, ids, DecoderOptions(FfnSkip(1)))
        stream = walk.stream(_controls(table))
        for number, layer in walk.layers():
            walk.through(number, layer, stream)
            found.append(stream.entered["verdict_1"].squeeze(1).double().numpy() + float(_NEVER))
            on_progress(Progress("comparing states", number + 1, layers))
    return np.stack(found)


def _run(
    checkpoint: Checkpoint, ids: np.ndarray, region: FfnRegion, tables: Sequence[np.ndarray], *, losses: bool = False
) -> list[tuple[np.ndarray, float]]:
    """The shares that each table of thresholds keeps, [L, 2] float64, and the text's mean loss (0 unless wanted)."""
    kept = [np.ones((len(table), 2)) for table in tables]
    if not tables:
        return []
    with torch.inference_mode():
        walk = Walk(checkpoint, ids, DecoderOptions(FfnSkip(region.stride)))
        below = walk.stream(_controls(tables[0]))
        streams = [below]
        for number, layer in walk.layers():
            if number > region.last and not losses:
                break
            if number == region.first:
                streams = [walk.resumed(below, _controls(table)) for table in tables]
            for at, stream in enumerate(streams):
                share = float(walk.through(number, layer, stream)["mlp"].double().mean())
                if number >= region.first:
                    kept[at][number, 1] = share
        return [(shares, _loss(walk, stream) if losses else 0.0) for stream, shares in zip(streams, kept, strict=True)]


def _loss(walk: Walk, stream: Stream) -> float:
    nats, tokens = 0.0, 0
    for ids, logits in walk.logits(stream):
        nats += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        tokens += ids[:, 1:].numel()
    return nats / tokens


def _quietest(change: np.ndarray, stride: int, wanted: float) -> FfnRegion:
    """The range of layers that change states least, long enough for a share."""
    layers = len(change)
    needed = (1 - wanted) * layers * (stride + 1) / stride
    length = min(max(math.ceil(ROOM * needed), stride + 1), layers - 2)
    means = change.mean(axis=1)
    first = min(range(1, layers - length), key=lambda at: means[at : at + length].sum(), default=1)
    return FfnRegion(first, first + length - 1, stride)


def _least(region: FfnRegion, layers: int) -> float:
    """The smallest share that a region can keep: after every FFN that ran, a whole stride is skipped."""
    length = region.last - region.first + 1
    whole, rest = divmod(length, region.stride + 1)
    return 1 - (whole * region.stride + max(rest - 1, 0)) / layers


def _simulated(change: np.ndarray, region: FfnRegion, wanted: float) -> float:
    """The threshold that would keep a share if skipping did not change later states, by bisection."""
    low, high = 0.0, float(change[region.first : region.last + 1].max())
    for _ in range(40):
        middle = (low + high) / 2
        if _share(change, region, middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def _share(change: np.ndarray, region: FfnRegion, threshold: float) -> float:
    left = np.zeros(change.shape[1], np.int64)
    skipped = 0
    for layer in range(region.first, region.last + 1):
        skip = left > 0
        skipped += int(skip.sum())
        left = np.where(skip, left - 1, np.where(change[layer] <= threshold, region.stride, 0))
    return 1 - skipped / change.size


def _controls(table: np.ndarray) -> RuntimeValues:
    return {"thresholds": table[None], "full_until": np.zeros(1, np.int64)}
