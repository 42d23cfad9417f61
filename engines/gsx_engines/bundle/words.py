"""Words that `gsx.json`, the exporter and the runners share, and their order. Imports nothing, not even pydantic."""

from __future__ import annotations

from typing import Literal

Branch = Literal["attn", "mlp"]
# The order of the columns in tables with one for each branch.
BRANCHES: tuple[Branch, ...] = ("attn", "mlp")
# K and V of skipped tokens: their own, those of the layer below, or none (docs/design.md, section 3).
KvPolicy = Literal["compute", "copy", "none"]
# Type of weights and activations.
Precision = Literal["fp32", "fp16", "bf16"]
# How kept tokens are chosen: by a calibrated threshold, or the best of the call.
SelectionMode = Literal["threshold", "rank"]
