"""Caches of the reference in which not every token has its own K and V: K/V policies, and loops that share a cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from gsx_engines.bundle.words import BRANCHES, KvPolicy
from gsx_exporter.config import ModelConfig
from gsx_exporter.reference.call import Call


class SkippingCache(DynamicCache):
    """K/V policies `copy` and `none`: if attention is skipped, K and V are those of the layer below (layer 0 computes
    its own), or zeros.

    It shares the layers of the caller's cache, which therefore receives the result.
    """

    def __init__(self, target: DynamicCache, call: Call, config: ModelConfig, kv_policy: KvPolicy) -> None:
        super().__init__()
        self.layers = target.layers
        self._call, self._config = call, config
        self._copies, self._drops = kv_policy == "copy", kv_policy == "none"
        # By number of the layer, or of the visit: K and V that another one may copy.
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key_states, value_states = self.own(key_states, value_states, layer_idx)
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx)
        return updated

    def passed(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as `update`, but nothing stays in the cache."""
        new = self.own(key_states, value_states, layer_idx)
        past = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if past is None or not past.is_initialized:
            return new
        return torch.cat((past.keys, new[0]), dim=-2), torch.cat((past.values, new[1]), dim=-2)

    def own(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the call's tokens, with those of skipped tokens replaced."""
        number = layer_idx if self._config.loops is None else self._call.visit
        below = self._made.pop(self._config.below(number), None)
        if self._drops:
            below = (torch.zeros_like(key_states), torch.zeros_like(value_states))
        if below is not None:
            keep = self._call.decisions[number][BRANCHES.index("attn")].keep | ~self._call.valid
            keep = keep[:, None, :, None].to(key_states.device)
            key_states = torch.where(keep, key_states, below[0])
            value_states = torch.where(keep, value_states, below[1])
        if self._copies:
            self._made[number] = (key_states, value_states)
        return key_states, value_states


class PassingCache:
    """The cache of a visit whose K and V do not stay, where the loops share a cache."""

    def __init__(self, cache: SkippingCache) -> None:
        self._cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tokens of the call see."""
        return self._cache.passed(key_states, value_states, layer_idx)
