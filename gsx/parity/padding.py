"""Two sequences of different lengths in one call, padded on the left: each must give what it gives by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.manifest import Manifest
from gsx_exporter.rules.settings import Setting

# Two stretches of the text, of different lengths, so that one is padded.
_TOKENS = (48, 29)


def padded_batch(windows: np.ndarray, eos_ids: Sequence[int], attempt: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [2, S] of two stretches of windows [M, S'].

    They begin differently, since equal beginnings have equal scores. Both have an end-of-text token, which running text
    does not have, and which GateSkip always keeps.

    Args: attempt: number of the stretch, from 0.
    """
    first, last = windows[0], windows[-1]
    # At most this long, so that another attempt can begin at another position.
    long, short = (min(count, len(first) - 1) for count in _TOKENS)
    ids, mask = np.zeros((2, long), np.int64), np.zeros((2, long), np.int64)
    start = long * attempt % (len(first) - long)
    ids[0], mask[0] = first[start : start + long], 1
    differing = np.flatnonzero(last[: len(last) - short] != ids[0, 0])
    start = int(differing[-1 - attempt]) if len(differing) > attempt else len(last) - short
    ids[1, long - short :], mask[1, long - short :] = last[start : start + short], 1
    if eos_ids:
        ids[:, long - short // 2] = eos_ids[0]
    return ids, mask


def padded_keeps(manifest: Manifest, settings: Sequence[Setting], setting: Setting) -> list[KeepSettings]:
    """What each of the two sequences keeps: with sets of layers, the second has the set of the next setting."""
    policy = manifest.policy
    apart = policy is not None and any(
        manifest.by_sequence(read.name) for read in policy.inputs if read.name != "full_until"
    )
    other = settings[(settings.index(setting) + 1) % len(settings)] if apart else setting
    return [setting.keep, other.keep]
