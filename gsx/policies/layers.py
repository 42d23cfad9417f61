"""`--policy layers` and `unified`: a set of layers for each request, given or from a target speed-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import JsonValue

from gsx.policies.base import Choice, OnProgress, Plan, Sections, bad_parameters, refuse_budget, refuse_rank
from gsx_engines.bundle.drafts import places_text
from gsx_engines.bundle.layer_sets import Places, mask_of, parse_places, unified_places
from gsx_engines.bundle.policy import Policy, RuntimeInput
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import BRANCHES, ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.rules.layers import Layers
from gsx_exporter.text import TokenText


@dataclass(frozen=True)
class LayersPlan(Plan):
    """A set, which requests may change.

    Args:
        kept: the branches that run by default.
        speedup: of Unified Layer Skipping, whose prompts run in full; None for a set.
        exits: depths that the checkpoint was trained to leave at.
    """

    drafts_layers: ClassVar[bool] = True

    kept: Places = ()
    speedup: float | None = None
    exits: tuple[int, ...] = ()

    def settle(
        self, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
    ) -> Sections:
        assert self.rule is not None
        mask = mask_of(self.kept, checkpoint.config.num_layers, self.kv_policy).tolist()
        parameters: dict[str, JsonValue] = {"layers": places_text(self.kept)}
        if self.speedup is not None:
            parameters["speedup"] = self.speedup
        policy = Policy(
            name=self.name,
            branches=self.rule.branches,
            inputs=(
                RuntimeInput(name="layer_mask", least=0, most=1, default=mask),
                RuntimeInput(name="full_until", least=0, most=None, default=0),
            ),
            parameters=parameters,
            exits=self.exits,
            warm_up=None if self.speedup is None else 0,
        )
        return policy, None


def plan_layers(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    """Raises: UsageError: a set that names layers that are not there, or keeps nothing."""
    _refuse_thresholds("layers", choice)
    everything = tuple((layer, branch) for layer in range(config.num_layers) for branch in BRANCHES)
    kept = everything
    if parameters:
        try:
            kept = parse_places(parameters)
        except ValueError:
            bad_parameters("layers", "the layers that run, e.g. layers:0-5,8", parameters)
    return _plan("layers", choice, config, kept)


def plan_unified(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    """Raises: UsageError: a speed-up that the model's layers do not give."""
    _refuse_thresholds("unified", choice)
    try:
        speedup = float(parameters)
    except ValueError:
        bad_parameters("unified", "a target speed-up, e.g. unified:1.5", parameters)
    return _plan("unified", choice, config, unified_places(config.num_layers, speedup), speedup)


def _plan(name: str, choice: Choice, config: ModelConfig, kept: Places, speedup: float | None = None) -> Plan:
    kv_policy = choice.kv_policy or "none"
    mask_of(kept, config.num_layers, kv_policy)  # refuses what cannot run
    return LayersPlan(name, Layers(), kv_policy, kept=kept, speedup=speedup, exits=config.exits)


def _refuse_thresholds(name: str, choice: Choice) -> None:
    refuse_budget(name, choice, "a set of layers is chosen by --layers, --exit or --speedup")
    refuse_rank(name, choice)
