"""Vectors of `thresholds.json`: thresholds of the gated toy by budget, as the float32's own bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.vectors.models import toy_manifest
from tests.vectors.toy import float_text

BUDGETS = (1.0, 0.99, 0.9, 0.8, 0.77, 2 / 3, 0.5, 0.31, 0.3)


def vectors() -> dict[str, Any]:
    """The manifest that the thresholds are read from, and the thresholds."""
    manifest = toy_manifest()
    assert manifest.selection is not None
    table = {budget: manifest.selection.thresholds_for(budget).view(np.uint32) for budget in BUDGETS}
    return {
        "manifest": manifest.model_dump(mode="json"),
        "budgets": [{"budget": float_text(budget), "bits": bits.ravel().tolist()} for budget, bits in table.items()],
    }
