"""Ouro (arXiv:2510.25741): its configuration and its dense model, which no release of transformers has.

WRITTEN FROM THE PUBLISHED DESCRIPTION, not the authors' code: the paper, the published configuration and the names and
shapes of the published tensors, checked against vLLM's port of the model (`model_executor/models/ouro.py`, Apache-2.0;
facts only). So parity of an Ouro bundle shows that it computes this description. Its parts are transformers' Llama.

All layers run `total_ut_steps` times. A layer has norms around both branches, and the final norm follows each loop:
what it gives enters the next one, and the head. Each loop has K/V caches of its own. The exit gate reads what each loop
gives; with the published `early_exit_threshold` of 1 it decides nothing (`--policy calm:gate` makes it decide).
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaModel, LlamaRMSNorm

NAME = "ouro"


@strict
class OuroConfig(LlamaConfig):
    """Ouro's `config.json`.

    Args:
        total_ut_steps: the number of loops.
        early_exit_threshold: the probability of having left, summed over loops, at which a token takes a loop's result.
        use_sliding_window: no published model has one.
    """

    model_type = NAME
    total_ut_steps: int = 4
    early_exit_threshold: float = 1.0
    use_sliding_window: bool = False

    def validate_architecture(self) -> None:
        """See `LlamaConfig`. Raises: ValueError: what this description does not cover."""
        super().validate_architecture()
        if self.use_sliding_window:
            raise ValueError("an Ouro with windows is not described: use_sliding_window must be false")
        if self.early_exit_threshold < 1:
            raise ValueError(f"early_exit_threshold must be 1 (no token leaves early), got {self.early_exit_threshold}")


class _OfLoop:
    """The caches of one loop: those of the layers, `offset` further on."""

    def __init__(self, cache: Cache, offset: int) -> None:
        self._cache, self._offset = cache, offset

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, **rest: Any) -> Any:
        """See `Cache`."""
        return self._cache.update(key, value, layer + self._offset, **rest)


class OuroDecoderLayer(nn.Module):
    """A layer with norms around both branches."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.input_layernorm_2 = LlamaRMSNorm(width, eps), LlamaRMSNorm(width, eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)
        self.post_attention_layernorm_2 = LlamaRMSNorm(width, eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: [B, S, H] -> the same."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.input_layernorm_2(attended)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        added: torch.Tensor = hidden_states + self.post_attention_layernorm_2(output)
        return added


class OuroModel(LlamaModel):
    """The looped layers, with the final norm after each loop."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(OuroDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `LlamaModel`."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        angles = self.rotary_emb(hidden, position_ids=position_ids)
        for loop in range(self.config.total_ut_steps):
            own = None if cache is None else _OfLoop(cache, loop * len(self.layers))
            for layer in self.layers:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, cache=own)
            hidden = self.norm(hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)


class OuroForCausalLM(LlamaForCausalLM):
    """The model with its head."""

    config_class = OuroConfig

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.post_init()


def register() -> None:
    """Make transformers' automatic classes know the family; calling it again changes nothing."""
    AutoConfig.register(NAME, OuroConfig, exist_ok=True)
    AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM, exist_ok=True)
