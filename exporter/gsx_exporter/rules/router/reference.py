"""The reference rules of routers: the papers' rules over all tokens, with the networks (docs/routers.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gsx_engines.bundle.selection import check_budget
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.reference.rule import BranchInput, Decision, MaskCall, Masker, Stateless, certain
from gsx_exporter.reference.thresholds import check_thresholds, thresholds_at
from gsx_exporter.router_config import NetConfig, RouterConfig

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}
Net = Callable[[torch.Tensor], torch.Tensor]


class Routers:
    """A checkpoint's routers, predictors and adapters, by layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        router = checkpoint.config.router
        assert router is not None, "the checkpoint has routers"
        self.config: RouterConfig = router
        self._checkpoint = checkpoint
        self.nets: dict[tuple[int, str], Net] = {}
        for layer in router.routed(checkpoint.config.num_layers):
            names = ["router"] if router.decides == "layer" else [f"{branch}_router" for branch in router.branches]
            for name in names:
                self.nets[layer, name] = self._net(layer, name, router.net)
                if router.predictor is not None:
                    self.nets[layer, name + "_predictor"] = self._net(layer, name + "_predictor", router.predictor)
            if router.adapter is not None:
                self.nets[layer, "mlp_adapter"] = self._adapter(layer)

    def _net(self, layer: int, name: str, net: NetConfig) -> Net:
        if net.hidden is None:
            return self._linear(layer, name, net.bias)
        parts = [self._linear(layer, f"{name}.hidden", net.bias)]
        if net.norm:
            weight = self._weight(layer, f"{name}.norm.weight")
            norm = nn.RMSNorm(len(weight), eps=self._checkpoint.config.rms_norm_eps)
            norm.weight = nn.Parameter(weight, requires_grad=False)
            parts.append(norm)
        return nn.Sequential(*parts, _ACTIVATIONS[net.activation](), self._linear(layer, f"{name}.out", net.bias))

    def _adapter(self, layer: int) -> Net:
        gate, up, down = (self._linear(layer, f"mlp_adapter.{name}_proj", False) for name in ("gate", "up", "down"))
        return lambda x: down(nn.functional.silu(gate(x)) * up(x))

    def _linear(self, layer: int, name: str, bias: bool) -> nn.Module:
        weight = self._weight(layer, f"{name}.weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            linear.bias = nn.Parameter(self._weight(layer, f"{name}.bias"), requires_grad=False)
        return linear

    def _weight(self, layer: int, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(f"model.layers.{layer}.{name}").float()


@dataclass(frozen=True)
class RoutedByThreshold:
    """A token runs a branch if its router's score is above the threshold.

    Args:
        thresholds: [L, 2], or [B, L, 2] with a table for each sequence, float32; with one router for a
            layer, the first column is used.
    """

    thresholds: np.ndarray

    def __post_init__(self) -> None:
        check_thresholds(self.thresholds)

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        thresholds = self.thresholds

        def keep(
            layer: int, branch: Branch, score: torch.Tensor, free: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            tau = thresholds_at(thresholds, layer, branch)
            return score > tau, (score.double() - tau).abs()

        return _Routed(call, keep)


@dataclass(frozen=True)
class RoutedByRank:
    """The best `max(1, floor(budget x n))` of the call's n tokens run, as Mixture-of-Depths is trained."""

    budget: float

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def start(self, call: MaskCall) -> Masker:
        """See `ReferenceRule`."""
        budget = self.budget

        def keep(
            layer: int, branch: Branch, score: torch.Tensor, free: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            n = int(free.sum())
            count = min(n, max(1, int(round(budget * n, 6))))
            candidates = score.masked_fill(~free, float("-inf")).flatten()
            best = torch.zeros_like(candidates, dtype=torch.bool)
            best[candidates.sort(descending=True, stable=True).indices[:count]] = True
            worst_kept = candidates[best].min()
            others = candidates[~best]
            best_skipped = others.max() if len(others) else torch.tensor(float("-inf"))
            margin = (candidates.double() - torch.where(best, best_skipped, worst_kept).double()).abs()
            return best.view_as(score), margin.view_as(score)

        return _Routed(call, keep)


Select = Callable[[int, Branch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _Routed(Stateless):
    """Routers within one call; it stores the current layer's score and decision."""

    def __init__(self, call: MaskCall, keep: Select) -> None:
        self._call, self._keep = call, keep
        self._routers = routers = call.parts(Routers)
        self._config = routers.config
        # Tokens that the method always runs, whatever the router's score.
        self._first = (call.positions < self._config.full_first) & call.valid
        self._entering: BranchInput | None = None
        self._weight: torch.Tensor | None = None
        self._decision: Decision | None = None

    def decide(self, x: BranchInput) -> Decision:
        """See `Masker`."""
        config, valid = self._config, self._call.valid
        if x.branch == "attn":
            self._entering = x
        if not self._routes(x):
            return Decision(valid, None, certain(valid))
        if config.decides == "layer" and x.branch == "mlp":
            assert self._decision is not None
            return self._decision
        name = "router" if config.decides == "layer" else f"{x.branch}_router"
        read = self._entering if config.reads == "layer" else x
        assert read is not None
        source = (read.normed if config.input == "post_norm" else read.residual).float()
        self._weight = weight = self._as_weight(self._routers.nets[x.layer, name](source))
        score = weight
        if config.predictor is not None:
            score = torch.sigmoid(self._routers.nets[x.layer, name + "_predictor"](source))[..., 0]
        free = valid & ~self._first
        keep, margin = self._keep(x.layer, x.branch, score, free)
        self._decision = Decision(
            (keep | self._first) & valid,
            score.masked_fill(~valid, float("-inf")),
            margin.masked_fill(~free, float("inf")),
        )
        return self._decision

    def added(self, x: BranchInput, decision: Decision, output: torch.Tensor) -> torch.Tensor:
        """See `Masker`: the router's weight may multiply the output, and an adapter may replace a skipped MLP."""
        config = self._config
        keep = decision.keep[..., None]
        if not self._routes(x):
            return super().added(x, decision, output)
        assert self._weight is not None
        weight = self._weight[..., None].to(output.dtype)
        if config.multiplies == "layer" and x.branch == "mlp":
            # The layer adds attention's output, which is already in the residual stream, and the MLP's.
            assert self._entering is not None
            attended = x.residual - self._entering.residual
            return torch.where(keep, weight * (attended + output) - attended, 0.0)
        multiplied = config.multiplies == "branch" or (config.multiplies == "mlp" and x.branch == "mlp")
        added = torch.where(keep, weight * output if multiplied else output, 0.0)
        if config.adapter is not None and x.branch == "mlp":
            adapted = self._routers.nets[x.layer, "mlp_adapter"](x.normed.float()).to(output.dtype)
            added = added + torch.where(keep, 0.0, (1 - weight) * adapted if multiplied else adapted)
        return added

    def _routes(self, x: BranchInput) -> bool:
        layers = self._config.layers
        return x.branch in self._config.branches and (layers is None or x.layer in layers)

    def _as_weight(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, S, 1 or 2] -> [B, S]."""
        output, keep = self._config.output, self._config.keep_logit
        if output == "softmax":
            return logits.softmax(-1)[..., keep]
        if output == "difference":
            return logits[..., keep] - logits[..., 1 - keep]
        return logits.sigmoid()[..., 0] if output == "sigmoid" else logits[..., 0]
