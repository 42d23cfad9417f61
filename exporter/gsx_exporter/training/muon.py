"""Muon for the branches' matrices and AdamW for the rest, as one optimizer; and the bound on attention's logits.

Muon's updates are scaled to the size of AdamW's, so that one learning rate fits both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from gsx_exporter.checkpoint.tensors import is_gate
from gsx_exporter.training.learner import Learner


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one: their groups side by side, their states one behind the other.

    Args: parts: the two.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        groups = iter(self.param_groups)
        for part in self._parts:  # the same objects, so that a learning rate that is set here is set there
            part.param_groups = [next(groups) for _ in part.param_groups]

    @classmethod
    def of(cls, model: nn.Module, args: TrainingArguments) -> MuonWithAdamW:
        """For a model's trained parameters; weight decay applies to the branches' matrices only."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim == 2 and ".layers." in name and not is_gate(name)
                (matrices if is_matrix else others).append(parameter)
        rate = args.learning_rate
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
        betas = (args.adam_beta1, args.adam_beta2)
        return cls([muon, torch.optim.AdamW(others, lr=rate, betas=betas, weight_decay=0.0)])

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Both."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"parts": [part.state_dict() for part in self._parts], "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


@torch.no_grad()
def clip_attention(learner: Learner, limit: float, ids: torch.Tensor) -> None:
    """Scale down the queries of every head whose attention logits may exceed a limit (`MuonSettings.qk_clip`).

    Families that normalize Q and K have bounded logits and are not changed.

    Args: ids [B, S]: the sample on which norms are measured, with every branch run.
    """
    states: list[torch.Tensor] = []
    hooks = []
    for layer in learner.hf.model.layers:
        if not hasattr(layer.self_attn, "q_norm"):
            keep = lambda _m, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
            hooks.append((layer.self_attn, layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)))
    try:
        learner.run(ids)
    finally:
        for _, hook in hooks:
            hook.remove()
    for (attention, _), x in zip(hooks, states, strict=True):
        # RoPE, which is applied next, does not change the norms.
        q, k = (_head_norms(project(x), attention.head_dim) for project in (attention.q_proj, attention.k_proj))
        bound = q * k.repeat_interleave(len(q) // len(k)) * attention.scaling
        factor = (limit / bound).clamp(max=1.0).repeat_interleave(attention.head_dim)
        attention.q_proj.weight.mul_(factor[:, None])
        if attention.q_proj.bias is not None:
            attention.q_proj.bias.mul_(factor)


def _head_norms(x: torch.Tensor, width: int) -> torch.Tensor:
    """The largest 2-norm of each head over all tokens: x [B, S, heads * width] -> [heads]."""
    return x.float().reshape(-1, x.shape[-1] // width, width).norm(dim=-1).amax(0)
