"""Which policies `gsx compare` tries, and what each is set to: its own steps from careful to bold."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gsx_engines.bundle.controls import Keep
from gsx_engines.bundle.drafts import places_text
from gsx_engines.bundle.layer_sets import exit_places, unified_places
from gsx_engines.bundle.manifest import Manifest

# Name of a setting -> what a request asks for.
Settings = Mapping[str, Keep]

_SHARES = (1.0, 0.75, 0.5, 0.25)
_SPEEDUPS = (4 / 3, 2.0, 4.0)
_EXIT_THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.1)


def _budgets(manifest: Manifest) -> Settings:
    """The calibrated budgets."""
    assert manifest.selection is not None
    return {f"budget {point.budget:.3g}": Keep(budget=point.budget) for point in manifest.selection.grid}


def _even(manifest: Manifest) -> Settings:
    """Layers in even steps, for the prompt as well."""
    layers = manifest.decoder.num_layers
    counts = dict.fromkeys(round(share * layers) for share in _SHARES)
    return {
        f"{count} of {layers} layers": Keep(layers=places_text(unified_places(layers, layers / count)))
        for count in counts
        if count >= 2
    }


def _exits(manifest: Manifest) -> Settings:
    """The first layers: as many as the checkpoint was trained to leave at, and three quarters and half of them."""
    layers, policy = manifest.decoder.num_layers, manifest.policy
    assert policy is not None
    depths = {*policy.exits, *(round(share * layers) for share in (0.75, 0.5))}
    return {
        f"exit {depth} of {layers}": Keep(layers=places_text(exit_places(depth, layers)))
        for depth in sorted(depths, reverse=True)
        if 0 < depth < layers
    }


def _unified(manifest: Manifest) -> Settings:
    """The same even steps, with the prompt in full."""
    layers = manifest.decoder.num_layers
    return {f"speed-up {one:.3g}": Keep(speedup=one) for one in _SPEEDUPS if layers // one >= 2}


def _exit_thresholds(manifest: Manifest) -> Settings:
    """The range of the softmax measure."""
    return {f"threshold {one:g}": Keep(exit_threshold=one) for one in _EXIT_THRESHOLDS}


# The whole model, as the first of these that the checkpoint fits: where gates or routers multiply what branches give,
# there is no dense export.
WHOLE = {"dense": Keep(), "layers": Keep(), "router": Keep(budget=1.0)}

# `--policy` of an export -> the curves that are drawn from it. CALM's threshold is given with every request: the
# exported one only spares a search under a guarantee.
POLICIES: Mapping[str, Mapping[str, Callable[[Manifest], Settings]]] = {
    "gateskip": {"gateskip": _budgets},
    "router": {"router": _budgets},
    "layers": {"even layers": _even, "exits": _exits, "unified": _unified},
    "ffn-skip": {"ffn-skip": _budgets},
    "calm:threshold=0.5": {"calm": _exit_thresholds},
}
