"""Vectors of `hold.json`: the settings that hold a budget, after what each token kept."""

from __future__ import annotations

from typing import Any

from gsx_engines.bundle.hold import BLOCK, Hold
from tests.vectors.models import toy_manifest
from tests.vectors.toy import float_text, mix

BRANCHES = 12
# Budget -> per mille of the branches that tokens keep, on average, beyond or below the setting.
SEQUENCES = ((0.7, -160), (0.7, 0), (0.8, 90), (0.5, 250), (0.3, 40), (1.0, -100), (2 / 3, -30), (0.95, -400))


def vectors() -> dict[str, Any]:
    """Sequences of tokens that keep about what their setting says, and something else besides."""
    manifest = toy_manifest()
    assert manifest.selection is not None
    sequences = []
    for seed, (budget, other) in enumerate(SEQUENCES):
        hold = Hold(manifest.selection, budget, BRANCHES)
        kept, settings = [], []
        for token in range(40 * BLOCK):
            about = round(hold.setting * 1000) + other
            kept.append(sum(mix(seed, token, branch) % 1000 < about for branch in range(BRANCHES)))
            if hold.read(kept[-1]):
                settings.append(hold.setting)
        sequences.append({"budget": float_text(budget), "branches": BRANCHES, "kept": kept, "settings": settings})
    return {"manifest": manifest.model_dump(mode="json"), "sequences": sequences}
