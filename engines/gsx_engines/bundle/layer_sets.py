"""Sets of layers, as people write them and as masks for the run-time input `layer_mask`.

A set names branches: `5` is both branches of layer 5 (counted from 0), `5.mlp` one of them, `0-7` a range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable

import numpy as np

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_plugins.errors import UsageError

Places = tuple[tuple[int, Branch], ...]

_MOST_LAYERS = 10_000


def parse_places(text: str) -> Places:
    """Parse a set, e.g. `0-3,5.attn`, into (layer, branch) pairs in the order of the text.

    Raises:
        ValueError: the text is not a set, or names more branches than any model has (it may come from an untrusted
            client).
    """
    places: list[tuple[int, Branch]] = []
    for part in text.split(","):
        places += _places(part)
        if len(places) > _MOST_LAYERS * len(BRANCHES):
            raise ValueError(text)
    return tuple(places)


def mask_of(places: Iterable[tuple[int, Branch]], layers: int, kv_policy: str) -> np.ndarray:
    """The layer mask [L, 2] float32: 1 for the branches that run, 0 for the others.

    Raises:
        UsageError: layers that do not exist, an empty set, or a set without the first layer's attention under the K/V
            policy `copy`, where the layers above copy from it.
    """
    mask = np.zeros((layers, len(BRANCHES)), np.float32)
    unknown = sorted({layer for layer, _ in places if layer >= layers})
    if unknown:
        raise UsageError(
            "the set names layers that the model does not have",
            expected=f"layers from 0 to {layers - 1}",
            found=", ".join(map(str, unknown[:4])) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""),
        )
    for layer, branch in places:
        mask[layer, BRANCHES.index(branch)] = 1
    check_mask(mask, kv_policy)
    return mask


def check_mask(mask: np.ndarray, kv_policy: str) -> None:
    """Refuse a mask [.., L, 2] that keeps nothing and, under `copy`, one without the first layer's attention."""
    if not mask.any(axis=(-1, -2)).all():
        raise UsageError("the set keeps nothing", expected="at least one branch that runs")
    if kv_policy == "copy" and not mask[..., 0, 0].all():
        raise UsageError(
            "the set drops the first layer's attention",
            expected="a set with 0.attn: under the K/V policy copy the layers above copy its K and V",
            todo="keep layer 0, or export with the K/V policy none or compute",
        )


def exit_places(depth: int, layers: int, exits: Collection[int] = ()) -> Places:
    """The layers below an exit.

    Args:
        depth: how many layers run.
        layers: how many layers the model has.
        exits: the depths at which the model was trained to exit; empty allows all.
    Raises:
        UsageError: the model has no exit at this depth.
    """
    allowed = sorted({*exits, layers}) if exits else range(1, layers + 1)
    if depth not in allowed:
        raise UsageError(
            f"the model has no exit after {depth} layers",
            expected="one of " + ", ".join(map(str, allowed)) if exits else f"1 to {layers}",
            found=str(depth),
            todo=f"to run these layers anyway, give them as the set 0-{depth - 1}" if 0 < depth < layers else None,
        )
    return _whole(range(depth))


def unified_places(layers: int, speedup: float) -> Places:
    """The layers that Unified Layer Skipping keeps for a target speed-up (arXiv:2404.06954, released code).

    There are n = floor(layers / speedup) of them: the first layer, the last one, and between them multiples of
    floor(layers / (n - 1)), from the bottom up, until there are n.

    Raises:
        UsageError: a speed-up below 1, or one that leaves fewer than two layers.
    """
    if not (math.isfinite(speedup) and speedup >= 1):
        raise UsageError("the speed-up is out of range", expected="a number of at least 1", found=f"{speedup:g}")
    count = math.floor(layers / speedup + 1e-9)  # 3 / 0.3 must not become 9
    if count < 2:
        raise UsageError(
            f"a speed-up of {speedup:g} leaves fewer than two of {layers} layers",
            expected=f"at most {layers / 2:g}: the first and the last layer always run",
            found=f"{speedup:g}",
        )
    step = layers // (count - 1)
    inner = [layer for layer in range(1, layers - 1) if layer % step == 0][: count - 2]
    return _whole([0, *inner, layers - 1])


def _whole(layers: Iterable[int]) -> Places:
    return tuple((layer, branch) for layer in layers for branch in BRANCHES)


def _places(part: str) -> Places:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?(?:\.(attn|mlp))?", part.strip())
    if found is None:
        raise ValueError(part)
    first, last, branch = int(found[1]), int(found[2] or found[1]), found[3]
    if last < first or last > _MOST_LAYERS:
        raise ValueError(part)
    return tuple((layer, b) for layer in range(first, last + 1) for b in BRANCHES if branch in (None, b))
