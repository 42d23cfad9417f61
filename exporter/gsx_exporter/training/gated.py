"""Gates on a Hugging Face model of any supported family: modules of its layers, applied by hooks while it trains.

Nothing of the model is replaced or renamed, so PEFT, accelerate and transformers' own saving see the model that they
know. The gates follow GateSkip as its authors train it (methods.md 3.1, 3.2): a gate reads a detached input, its output
multiplies the branch, and the tokens of a text with the lowest scores are skipped, by the (1 - budget) quantile. They
are skipped by a mask, which gives what real skipping gives but saves nothing. A text is one row: the published recipe
trains one text at a time, and so what a row learns depends neither on the batch nor on the number of processes.

The layer dropout of LayerSkip is here too: a dropped layer's branches add nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gsx_engines.bundle.counting import kept_count
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.config import ModelConfig
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.gate_shares import kept_shares

# Of logits that are ranked: well above the rounding of a logit, well below what tells tokens apart.
_STEP = 2.0**-16
MODULES: dict[Branch, str] = {"attn": "self_attn", "mlp": "mlp"}


@dataclass
class Call:
    """One call of the model: what its layers read, and what they leave behind.

    Args:
        shares: (layer, branch) -> share of the tokens of a row that it keeps; all where there is none.
        ended: [B, S] bool, end-of-text and padding: always kept, and not counted.
        live: [L, B] bool, which rows run which layer; None for all.
        depths: the layers whose results are wanted, counted from 1.
        gated: whether gates act; without them the model is the dense one.
        straight_through: whether skipped tokens teach a gate, too (`GateSettings.estimator`).
        scores: (layer, branch) -> [B, S] float32.
        squares: (layer, branch) -> [B, S] float32, the mean of g^2 of each token.
        states: depth -> [B, S, H], the residual stream after so many layers.
    """

    shares: Mapping[tuple[int, Branch], float]
    ended: torch.Tensor
    live: torch.Tensor | None = None
    depths: frozenset[int] = frozenset()
    gated: bool = True
    straight_through: bool = False
    scores: dict[tuple[int, Branch], torch.Tensor] = field(default_factory=dict)
    squares: dict[tuple[int, Branch], torch.Tensor] = field(default_factory=dict)
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    def last_skipped(self, layer: int, branch: Branch) -> torch.Tensor:
        """[B, 1] int64, in a row's ascending scores the last one that is skipped; -1 to skip nothing."""
        share = self.shares.get((layer, branch), 1.0)
        last = [n - 1 - kept_count(n, share) for n in self._counted]
        return torch.tensor(last, device=self.ended.device)[:, None]

    @cached_property
    def _counted(self) -> list[int]:
        return (~self.ended).sum(1).tolist()


def gate_name(branch: Branch) -> str:
    """A gate's name within its layer."""
    return f"{branch}_gate"


def is_constant(gate: nn.Linear) -> bool:
    """Whether a gate gives every token the same score: it cannot choose, so its branch always runs."""
    return not bool(gate.weight.any())


def add_gates(
    hf: Any, gate: GateConfig, *, bias: float, std: float, seed: int, open_layers: Collection[int] = ()
) -> None:
    """Give every layer its gates, nearly open: the same bias, and small random weights.

    Args: open_layers: those whose gates get no weights, and so stay open.
    """
    generator = torch.Generator().manual_seed(seed)
    width = hf.config.hidden_size
    for number, layer in enumerate(hf.model.layers):
        device = next(layer.parameters()).device
        for branch in gate.branches:
            made = nn.Linear(width, width if gate.kind == "vector" else 1, dtype=torch.float32)
            with torch.no_grad():
                made.weight.normal_(0.0, 0.0 if number in open_layers else std, generator=generator)
                made.bias.fill_(bias)
            setattr(layer, gate_name(branch), made.to(device))


class Hooks:
    """The hooks on a model's layers.

    They work for `call`, which stays after the forward pass: with activation checkpointing, the backward pass computes
    the layers again. Without a call they do nothing.

    Args:
        hf: transformers' model; its layers have gates if `config.gate` says so.
        config: the model's.
    """

    def __init__(self, hf: Any, config: ModelConfig) -> None:
        self.call: Call | None = None
        gates = config.gate.branches if config.gate is not None else ()
        self._choosing = {
            (number, branch): not is_constant(getattr(layer, gate_name(branch)))
            for number, layer in enumerate(hf.model.layers)
            for branch in gates
        }
        self.weigh(config.gate.skip_weights if config.gate is not None else None)
        for number, layer in enumerate(hf.model.layers):
            layer.register_forward_hook(self._keeps(number + 1))
            for branch in BRANCHES:
                hook = _Branch(self, layer, number, branch, config)
                module = getattr(layer, MODULES[branch])
                module.register_forward_pre_hook(hook.before, with_kwargs=True)
                module.register_forward_hook(hook.after)

    def weigh(self, skip_weights: Sequence[Sequence[float]] | None) -> None:
        """Say how much of the skipping each gate takes (`GateConfig.skip_weights`)."""
        # Branches that always run count as kept: the others keep less, so that a budget is a share of all.
        each = iter([weight for layer in skip_weights for weight in layer] if skip_weights else [])
        self._weights = {key: next(each, 1.0) * choosing for key, choosing in self._choosing.items()}

    def shares(self, budget: float) -> dict[tuple[int, Branch], float]:
        """What each gate keeps at a budget."""
        return dict(zip(self._weights, kept_shares(list(self._weights.values()), budget), strict=True))

    def _keeps(self, depth: int) -> Any:
        def keep(_layer: nn.Module, _args: Any, output: Any) -> None:
            if self.call is not None and depth in self.call.depths:
                self.call.states[depth] = output[0] if isinstance(output, tuple) else output

        return keep


class _Branch:
    """The hooks of one branch."""

    def __init__(self, hooks: Hooks, layer: nn.Module, number: int, branch: Branch, config: ModelConfig) -> None:
        self._hooks, self._layer, self._number, self._branch = hooks, layer, number, branch
        self._gate = config.gate if config.gate is not None and branch in config.gate.branches else None
        self._constant = self._gate is not None and is_constant(getattr(layer, gate_name(branch)))
        self._input: torch.Tensor | None = None
        self._factor: torch.Tensor | None = None
        norm = config.norms[branch].before
        if self._gate is not None and self._gate.input == "pre_norm" and norm is not None:
            layer.get_submodule(norm).register_forward_pre_hook(self._note)

    def _note(self, _norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._input = args[0]

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide, before the branch runs."""
        call, self._factor = self._hooks.call, None
        if call is None:
            return
        if self._gate is not None and call.gated:
            x = self._input if self._input is not None else args[0] if args else kwargs["hidden_states"]
            self._factor = self._gate_factor(call, x)
        self._input = None
        if call.live is not None:
            live = call.live[self._number][:, None, None].float()
            self._factor = live if self._factor is None else self._factor * live

    def after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Multiply what the branch gives."""
        factor = self._factor
        if factor is None:
            return None
        self._factor = None
        if isinstance(output, tuple):
            return (output[0] * factor.to(output[0].dtype), *output[1:])
        return output * factor.to(output.dtype)

    def _gate_factor(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] or [B, S, 1] float32, 0 for skipped tokens."""
        gate: Any = getattr(self._layer, gate_name(self._branch))
        with torch.autocast(x.device.type, enabled=False):
            logits = gate(x.detach().to(gate.weight.dtype)).float()
            g = torch.sigmoid(logits)
            by_logit = self._gate is not None and self._gate.score == "logit"
            score = (logits if by_logit else g).mean(-1)
            if self._constant:
                return g
            with torch.no_grad():
                # Equal tokens get equal logits but for rounding, which must not choose between them.
                ranked = (score / _STEP).round() * _STEP if by_logit else score
                ranked = ranked.masked_fill(call.ended, float("inf"))
                last = call.last_skipped(self._number, self._branch)
                tau = ranked.sort(dim=1).values.gather(1, last.clamp(min=0))
                keep = (ranked > tau) | (last < 0)
            key = self._number, self._branch
            call.scores[key] = score.detach()
            call.squares[key] = g.square().mean(-1)
            factor = torch.where(keep[..., None], g, 0.0)
            if call.straight_through:
                factor = factor + _slope(score, tau, call.ended)[..., None] * g.detach()
            return factor


def _slope(score: torch.Tensor, tau: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """[B, S] zeros, with the gradient of a soft decision."""
    counted = ~ended
    count = counted.sum(1, keepdim=True).clamp(min=2)
    known = score.detach().masked_fill(ended, 0.0)
    mean = known.sum(1, keepdim=True) / count
    spread = ((known - mean).square().masked_fill(ended, 0.0).sum(1, keepdim=True) / count).sqrt().clamp(min=1e-6)
    soft = torch.sigmoid((score - tau) / spread).masked_fill(ended, 0.0)
    return soft - soft.detach()
