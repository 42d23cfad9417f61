"""The mask rule that a bundle's manifest and a request's run-time inputs amount to."""

from __future__ import annotations

from gsx_engines.bundle.controls import Controls
from gsx_engines.bundle.manifest import Manifest
from gsx_exporter.masks.base import KeepAll, MaskRule
from gsx_exporter.masks.calm import Confident
from gsx_exporter.masks.ffn_skip import FfnStride
from gsx_exporter.masks.gateskip import Rank, Threshold
from gsx_exporter.masks.layers import LayerMask
from gsx_exporter.masks.router import RoutedByRank, RoutedByThreshold


def mask_of(manifest: Manifest, controls: Controls) -> MaskRule:
    """The rule as the reference takes it."""
    policy, selection = manifest.policy, manifest.selection
    if policy is None:
        return KeepAll()
    if policy.name == "gateskip":
        assert selection is not None
        return Rank(float(controls["budget"])) if selection.mode == "rank" else Threshold(controls["thresholds"])
    if policy.name == "router":
        assert selection is not None
        if selection.mode == "rank":
            return RoutedByRank(float(controls["budget"]))
        return RoutedByThreshold(controls["thresholds"])
    if policy.name == "calm":
        found = policy.confidence
        assert found is not None
        threshold = float(controls["exit_threshold"])
        return Confident(
            policy.exits, found.measure, threshold, controls["full_until"], found.decay, found.decay_tokens
        )
    if policy.name == "ffn-skip":
        stride = int(str(policy.parameters["stride"]))
        return FfnStride(controls["thresholds"], stride, controls["full_until"])
    assert policy.name in ("layers", "unified"), policy.name
    return LayerMask(controls["layer_mask"], controls["full_until"])
