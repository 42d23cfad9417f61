"""`--policy layers` and `unified`: a set of layers for each request, given directly or by a target speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, layer_mask
from gsx_engines.bundle.drafts import places_text
from gsx_engines.bundle.layer_sets import Places, exit_places, mask_of, parse_places, unified_places
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import (
    LayersParameters,
    LayersPolicy,
    Policy,
    RuntimeInput,
    UnifiedParameters,
    UnifiedPolicy,
)
from gsx_engines.bundle.selection import Selection
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.layers.reference import LayerMask
from gsx_exporter.rules.layers.traced import Layers
from gsx_exporter.rules.parameters import bad_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled, refuse_budget, refuse_rank
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import Curve, Setting, note_unused_budgets
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress

# Speed-up that `gsx verify` uses; shares of the layers and speed-ups that `gsx compare` uses.
VERIFIED_SPEEDUP = 4 / 3
_SHARES = (1.0, 0.75, 0.5, 0.25)
_SPEEDUPS = (4 / 3, 2.0, 4.0)


@dataclass(frozen=True)
class LayersPlan(RulePlan):
    """A set of layers, which requests may change.

    Args:
        kept: the branches that run by default.
        speedup: that of Unified Layer Skipping, whose prompts run in full; None for a set.
        exits: exit depths that the checkpoint was trained for.
    """

    drafts_layers: ClassVar[bool] = True

    kept: Places = field(kw_only=True)
    speedup: float | None = field(kw_only=True)
    exits: tuple[int, ...] = field(kw_only=True)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`."""
        mask = mask_of(self.kept, checkpoint.config.num_layers, self.kv_policy).tolist()
        inputs = (
            RuntimeInput(name="layer_mask", least=0, most=1, default=mask),
            RuntimeInput(name="full_until", least=0, most=None, default=0),
        )
        named = places_text(self.kept)
        policy: Policy
        if self.speedup is None:
            policy = LayersPolicy(
                branches=self.branches, inputs=inputs, parameters=LayersParameters(layers=named), exits=self.exits
            )
        else:
            policy = UnifiedPolicy(
                branches=self.branches,
                inputs=inputs,
                parameters=UnifiedParameters(layers=named, speedup=self.speedup),
                exits=self.exits,
                warm_up=0,
            )
        return Settled(Layers(), policy)


def plan_layers(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `layers`.

    Raises:
        UsageError: a set with layers that the model does not have, or an empty one.
    """
    _refuse_thresholds("layers", options)
    everything = tuple((layer, branch) for layer in range(config.num_layers) for branch in BRANCHES)
    kept = everything
    if parameters:
        try:
            kept = parse_places(parameters)
        except ValueError:
            bad_parameters("layers", "the layers that run, e.g. layers:0-5,8", parameters)
    return _plan("layers", options, config, kept)


def plan_unified(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `unified`.

    Raises:
        UsageError: a speed-up that cannot be reached with the model's layers.
    """
    _refuse_thresholds("unified", options)
    try:
        speedup = float(parameters)
    except ValueError:
        bad_parameters("unified", "a target speed-up, e.g. unified:1.5", parameters)
    return _plan("unified", options, config, unified_places(config.num_layers, speedup), speedup)


def _plan(
    name: str, options: PolicyOptions, config: ModelConfig, kept: Places, speedup: float | None = None
) -> RulePlan:
    kv_policy = options.kv_policy or "none"
    mask_of(kept, config.num_layers, kv_policy)  # raises for a set that cannot run
    return LayersPlan(name, BRANCHES, kv_policy, kept=kept, speedup=speedup, exits=config.exits)


def _refuse_thresholds(name: str, options: PolicyOptions) -> None:
    refuse_budget(name, options, "a set of layers is given by --layers, --exit or --speedup")
    refuse_rank(name, options)


def _traced(recorded: Recorded) -> Layers:
    return Layers()


def _reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> ReferenceRule:
    return LayerMask(controls["layer_mask"], controls["full_until"])


def _settings(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """The exported set, all layers, an exit, a speed-up, and a set that differs by branch; without duplicates."""
    note_unused_budgets(asked, notes)
    layers = manifest.decoder.num_layers
    assert manifest.policy is not None
    trained = [depth for depth in manifest.policy.exits if depth < layers]
    depths = trained or [layers // 2]
    wanted = [
        (KeepSettings(), "as exported"),
        (KeepSettings(layers=f"0-{layers - 1}"), "all layers"),
        *((KeepSettings(exit=depth), f"exit {depth}") for depth in depths if depth > 0),
        (KeepSettings(layers=places_text(_uneven(layers))), "every second branch"),
    ]
    if layers >= 2 * VERIFIED_SPEEDUP:
        wanted.append((KeepSettings(speedup=VERIFIED_SPEEDUP), f"speed-up {VERIFIED_SPEEDUP:.2f}"))
    found: dict[bytes, Setting] = {}
    for keep, name in wanted:
        mask = layer_mask(manifest, keep)
        found.setdefault(mask.tobytes(), Setting(keep, name, float(mask.mean())))
    return sorted(found.values(), key=lambda one: -one.share)


def _uneven(layers: int) -> Places:
    """Attention in even layers, the MLP in odd ones, both in the first."""
    return tuple(
        (layer, branch)
        for layer in range(layers)
        for number, branch in enumerate(BRANCHES)
        if layer == 0 or layer % 2 == number
    )


def _exported_share(manifest: Manifest) -> float:
    return float(layer_mask(manifest, KeepSettings()).mean())


def _even(manifest: Manifest) -> Curve:
    """Evenly spaced layers, for the prompt as well."""
    layers = manifest.decoder.num_layers
    counts = dict.fromkeys(round(share * layers) for share in _SHARES)
    return {
        f"{count} of {layers} layers": KeepSettings(layers=places_text(unified_places(layers, layers / count)))
        for count in counts
        if count >= 2
    }


def _exits(manifest: Manifest) -> Curve:
    """The first layers only: up to each exit that the checkpoint was trained for, and three quarters and half."""
    layers, policy = manifest.decoder.num_layers, manifest.policy
    assert policy is not None
    depths = {*policy.exits, *(round(share * layers) for share in (0.75, 0.5))}
    return {
        f"exit {depth} of {layers}": KeepSettings(layers=places_text(exit_places(depth, layers)))
        for depth in sorted(depths, reverse=True)
        if 0 < depth < layers
    }


def _speedups(manifest: Manifest) -> Curve:
    """Evenly spaced layers, with the prompt in full."""
    layers = manifest.decoder.num_layers
    return {f"speed-up {one:.3g}": KeepSettings(speedup=one) for one in _SPEEDUPS if layers // one >= 2}


LAYERS = Rule(
    name="layers",
    plan=plan_layers,
    traced=_traced,
    reference=_reference,
    settings=_settings,
    exported_share=_exported_share,
    compared={"layers": {"even layers": _even, "exits": _exits, "unified": _speedups}},
    whole=KeepSettings(),
)
UNIFIED = Rule(
    name="unified",
    plan=plan_unified,
    traced=_traced,
    reference=_reference,
    settings=_settings,
    exported_share=_exported_share,
)
