"""The keep rule that a bundle's manifest names."""

from __future__ import annotations

from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import Selection
from gsx_engines.errors import BundleError
from gsx_exporter.config import ModelConfig
from gsx_exporter.rules.base import KeepRule
from gsx_exporter.rules.calm import Calm
from gsx_exporter.rules.ffn_skip import FfnSkip
from gsx_exporter.rules.gateskip import GateSkip
from gsx_exporter.rules.layers import Layers
from gsx_exporter.rules.router import Router


def rule_of(policy: Policy | None, selection: Selection | None, config: ModelConfig) -> KeepRule | None:
    """The rule as the decoder takes it; None for a dense bundle.

    Raises:
        BundleError: a policy that this version does not know.
    """
    if policy is None:
        return None
    if policy.name == "gateskip":
        assert config.gate is not None
        assert selection is not None
        return GateSkip(config.gate, config.eos_ids, selection.mode)
    if policy.name == "router":
        assert config.router is not None
        assert selection is not None
        return Router(config.router, config, selection.mode)
    if policy.name == "ffn-skip":
        return FfnSkip(int(str(policy.parameters["stride"])))
    if policy.name in ("layers", "unified"):
        return Layers()
    if policy.name == "calm":
        found = policy.confidence
        assert found is not None
        return Calm(policy.exits, found.measure, found.decay, found.decay_tokens)
    raise BundleError(
        f"gsx.json: the policy {policy.name!r} is not known",
        expected="gateskip, router, layers, unified, ffn-skip or calm",
        todo="install the version of gsx that made the bundle, or export again",
    )
