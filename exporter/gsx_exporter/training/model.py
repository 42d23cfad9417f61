"""The model that is trained: Hugging Face's layers with gates that skip, and losses at several depths.

The gates follow GateSkip as its authors train it (methods.md 3.1, 3.2): a gate reads a detached input, its output
multiplies the branch, and the tokens with the lowest scores of the batch are skipped, by the (1 - budget) quantile.
They are skipped by a mask, which gives the same result as real skipping but saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gsx_engines.bundle.counting import kept_count
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.config import GateConfig, ModelConfig
from gsx_exporter.training.config import TrainConfig
from gsx_exporter.training.schedule import exit_weight


@dataclass(frozen=True)
class Losses:
    """The losses of one batch, all scalars.

    Args:
        total: the loss to minimize; the only one with a gradient.
        cross_entropy: at the last layer, in nats per token.
        exit_cross_entropy: at this step's exit, against the configuration's exit_target; None without exits.
        gate_square: mean of g^2 over all gates.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    exit_cross_entropy: torch.Tensor | None
    gate_square: torch.Tensor


class GatedModel(nn.Module):
    """A Hugging Face causal model and its gates.

    Args:
        hf: a model of a supported family.
        config: its configuration; `config.gate` defines the gates.
        compile_layers: run the layers and the loss through torch.compile.
    """

    def __init__(self, hf: Any, config: ModelConfig, *, compile_layers: bool = False) -> None:
        super().__init__()
        self.hf = hf
        self.config = config
        gate = config.gate or GateConfig()
        rows = config.hidden_size if gate.kind == "vector" else 1
        self.gates = nn.ModuleDict(
            {
                _gate_key(branch, layer): nn.Linear(config.hidden_size, rows)
                for layer in range(config.num_layers)
                for branch in gate.branches
            }
        )
        self._layer: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _layer
        self._cross_entropy: Callable[..., torch.Tensor] = _cross_entropy
        self._distillation: Callable[..., torch.Tensor] = _distillation
        if compile_layers:
            self._layer = torch.compile(_layer)
            self._cross_entropy = torch.compile(_cross_entropy)
            self._distillation = torch.compile(_distillation)

    def reset_gates(self, *, bias: float, std: float, generator: torch.Generator) -> None:
        """Initialize the gates: nearly open, with the same bias and small random weights."""
        with torch.no_grad():
            for key in self.gates:
                gate = self._gate(key)
                gate.weight.normal_(0.0, std, generator=generator)
                gate.bias.fill_(bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All parameters, by their names in a gated checkpoint (docs/design.md section 5), except a tied head."""
        named = {name: p for name, p in self.hf.named_parameters() if not _is_tied_head(name, self.config)}
        for key in self.gates:
            prefix = _gate_prefix(key)
            named[prefix + ".weight"] = self._gate(key).weight
            named[prefix + ".bias"] = self._gate(key).bias
        return dict(sorted(named.items()))

    def _gate(self, key: str) -> nn.Linear:
        gate = self.gates[key]
        assert isinstance(gate, nn.Linear)
        return gate

    def losses(
        self,
        ids: torch.Tensor,
        *,
        train: TrainConfig,
        budget: float,
        exit_depth: int | None,
        live: torch.Tensor,
    ) -> Losses:
        """The losses of one batch.

        Args:
            ids: [B, S + 1] int64, inputs and, one position later, targets.
            train: the recipe.
            budget: share of tokens that each gated branch keeps.
            exit_depth: depth of the early-exit loss; None for no such loss.
            live: [L, B] bool, which sequences run which layer.
        """
        inputs, targets = ids[:, :-1], ids[:, 1:]
        decoder = self.hf.model
        call = self._begin(inputs, budget)
        h = call.hidden
        squares = []
        exit_state = None
        for i in range(len(decoder.layers)):
            h, square = self._run(self._layer, i, h, call, live[i])
            squares.append(square)
            if exit_depth == i + 1:
                exit_state = h
        weight = exit_weight(self.config.num_layers)
        final = self._cross_entropy(decoder.norm, self.hf.lm_head, h, targets)
        total = weight * final
        at_exit = None
        if exit_state is not None and exit_depth is not None:
            if train.exit_target == "model":
                at_exit = self._distillation(decoder.norm, self.hf.lm_head, exit_state, h.detach())
                exit_share = train.exit_scale * weight
            else:
                at_exit = self._cross_entropy(decoder.norm, self.hf.lm_head, exit_state, targets)
                exit_share = train.exit_scale * exit_weight(exit_depth)
            total = total + exit_share * at_exit
            weight += exit_share
        gate_square = torch.stack(squares).sum() / max(1, len(self.gates))
        return Losses(
            total=total / weight + train.sparsity * gate_square,
            cross_entropy=final.detach(),
            exit_cross_entropy=None if at_exit is None else at_exit.detach(),
            gate_square=gate_square.detach(),
        )

    @torch.no_grad()
    def clip_attention(self, ids: torch.Tensor, limit: float) -> None:
        """Scale down the queries of every head whose attention logits may exceed a limit (TrainConfig.qk_clip).

        Families that normalize Q and K have bounded logits and are not changed.

        Args: ids [B, S]: the sample on which norms are measured, at budget 1.
        """
        call = self._begin(ids, budget=1.0)
        h = call.hidden
        every = torch.ones(len(ids), dtype=torch.bool)
        for i, layer in enumerate(self.hf.model.layers):
            attention = layer.self_attn
            if not hasattr(attention, "q_norm"):
                x = layer.input_layernorm(h)
                # RoPE, which is applied next, does not change the norms.
                q, k = (_head_norms(project(x), attention.head_dim) for project in (attention.q_proj, attention.k_proj))
                bound = q * k.repeat_interleave(len(q) // len(k)) * attention.scaling
                factor = (limit / bound).clamp(max=1.0).repeat_interleave(attention.head_dim)
                attention.q_proj.weight.mul_(factor[:, None])
                if attention.q_proj.bias is not None:
                    attention.q_proj.bias.mul_(factor)
            h, _ = self._run(_layer, i, h, call, every)

    def _begin(self, inputs: torch.Tensor, budget: float) -> _Call:
        h = self.hf.model.embed_tokens(inputs)
        rope = self.hf.model.rotary_emb(h, torch.arange(inputs.shape[1])[None])
        ended = torch.isin(inputs, torch.tensor(self.config.eos_ids, dtype=inputs.dtype))
        return _Call(h, rope, ended, torch.tensor(_last_skipped(int((~ended).sum()), budget)))

    def _run(
        self,
        layer: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        i: int,
        h: torch.Tensor,
        call: _Call,
        live: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gates = [self.gates[key] if (key := _gate_key(b, i)) in self.gates else None for b in BRANCHES]
        mask = _window_mask(h.shape[1], self.config.windows[i])
        pre_norm = self.config.gate is not None and self.config.gate.input == "pre_norm"
        return layer(self.hf.model.layers[i], *gates, h, call.rope, mask, call.ended, call.last_skipped, live, pre_norm)


@dataclass(frozen=True)
class _Call:
    """The values that all layers of one call read."""

    hidden: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    ended: torch.Tensor
    last_skipped: torch.Tensor


def _head_norms(x: torch.Tensor, width: int) -> torch.Tensor:
    """The largest 2-norm of each head over all tokens: x [B, S, heads * width] -> [heads]."""
    return x.float().reshape(-1, x.shape[-1] // width, width).norm(dim=-1).amax(0)


def _layer(
    layer: Any,
    attn_gate: nn.Linear | None,
    mlp_gate: nn.Linear | None,
    h: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    ended: torch.Tensor,
    last_skipped: torch.Tensor,
    live: torch.Tensor,
    pre_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One decoder layer: h [B, S, H] -> the next h, and the sum of mean(g^2) over its gates."""
    live = live[:, None, None]
    x = layer.input_layernorm(h)
    factor, square = _gate_factor(attn_gate, h if pre_norm else x, ended, last_skipped)
    branch, _ = layer.self_attn(hidden_states=x, position_embeddings=rope, attention_mask=mask)
    h = h + torch.where(live, factor * branch, 0)
    x = layer.post_attention_layernorm(h)
    factor, mlp_square = _gate_factor(mlp_gate, h if pre_norm else x, ended, last_skipped)
    h = h + torch.where(live, factor * layer.mlp(x), 0)
    return h, square + mlp_square


def _gate_factor(
    gate: nn.Linear | None, x: torch.Tensor, ended: torch.Tensor, last_skipped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor for the branch's output, [B, S, H] or [B, S, 1] (0 for skipped tokens), and mean(g^2)."""
    if gate is None:
        return x.new_ones(1), torch.zeros(())
    g = torch.sigmoid(gate(x.detach()).float())
    with torch.no_grad():
        score = torch.where(ended, float("inf"), g.mean(-1))
        ordered = score.flatten().sort().values
        tau = ordered[last_skipped.clamp(min=0)]
        keep = (score > tau) | (last_skipped < 0)
    return torch.where(keep[..., None], g, 0), g.square().mean()


def _cross_entropy(norm: nn.Module, head: nn.Module, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(norm(h)).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _distillation(norm: nn.Module, head: nn.Module, h: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the prediction from an exit's state h against that from the last layer's, both [B, S, H]."""
    with torch.no_grad():
        wanted = head(norm(last)).float().softmax(-1)
    logits = head(norm(h)).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


def _last_skipped(tokens: int, budget: float) -> int:
    """Index of the threshold in the ascending scores (scores `<=` it are skipped); -1 to skip nothing."""
    return tokens - 1 - kept_count(tokens, budget)


def _window_mask(length: int, window: int | None) -> torch.Tensor | None:
    """An additive mask [1, 1, S, S]; None for plain causal attention."""
    if window is None or window >= length:
        return None
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < window)
    return torch.zeros(length, length).masked_fill(~seen, float("-inf"))[None, None]


def _is_tied_head(name: str, config: ModelConfig) -> bool:
    return config.tied_head and name == "lm_head.weight"


def _gate_key(branch: Branch, layer: int) -> str:
    return f"{branch}_{layer}"


def _gate_prefix(key: str) -> str:
    branch, layer = key.split("_")
    return f"model.layers.{layer}.{branch}_gate"
