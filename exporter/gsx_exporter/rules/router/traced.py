"""Routers: small trained networks that decide for each token which layers or branches run (docs/routers.md).

Mixture-of-Depths (arXiv:2404.02258), D-LLM, SkipGPT (arXiv:2506.04179) and FlexiDepth (arXiv:2503.23798) differ only in
the checkpoint's `RouterConfig`. Facts: docs/methods.md section 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsx_engines.bundle.words import BRANCHES, Branch, SelectionMode
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.modules import Linear, Mlp
from gsx_exporter.decoder.norm import RmsNorm
from gsx_exporter.decoder.rule import (
    BranchInput,
    BranchScore,
    HasModules,
    ReplacesSkipped,
    SharesScore,
    Tokens,
    TracedRule,
    Value,
    Values,
    apply_forced,
    before,
    forced,
)
from gsx_exporter.router_config import NetConfig, RouterConfig
from gsx_exporter.rules.scores import bound_of, by_token, call_values, selection_inputs, whole_inputs
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.threshold_gather.op import threshold_gather

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}


class RouterNet(nn.Module):
    """A router's network, in float32, so that decisions do not depend on the graph's precision."""

    def __init__(self, net: NetConfig, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[net.activation]
        if net.hidden is None:
            self.linear = Linear(width, out, net.bias, torch.float32)
            self.hidden = None
            return
        self.hidden = Linear(width, net.hidden, net.bias, torch.float32)
        self.norm = RmsNorm(net.hidden, eps, torch.float32) if net.norm else None
        self.out = Linear(net.hidden, out, net.bias, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] -> [N, out] float32."""
        x = x.to(torch.float32)
        if self.hidden is None:
            found: Tensor = self.linear(x)
            return found
        x = self.hidden(x)
        if self.norm is not None:
            x = self.norm(x)
        scores: Tensor = self.out(self.activation(x))
        return scores


@dataclass(frozen=True)
class Router(TracedRule, HasModules, SharesScore, ReplacesSkipped):
    """Keep tokens as the checkpoint's routers decide.

    Args:
        router: the checkpoint's routers.
        num_layers: of the model.
        selection: by `threshold` (run-time input `thresholds [B, L, 2]`; with one router for a layer, the first column
            is used), or by `rank`: the best tokens of the call (`budget []`), as Mixture-of-Depths is trained.
    """

    router: RouterConfig
    num_layers: int
    selection: SelectionMode = "threshold"

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for branch in BRANCHES if branch in self.router.branches)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.router.routed(self.num_layers)

    @property
    def hides_skipped(self) -> bool:
        return self.router.kv_policy == "none"

    @property
    def by_rank(self) -> bool:
        return self.selection == "rank"

    @property
    def inputs(self) -> Mapping[str, Value]:
        return selection_inputs(self.selection)

    @property
    def whole(self) -> frozenset[str]:
        return whole_inputs(self.selection)

    @property
    def call(self) -> Mapping[str, Value]:
        return call_values(self.selection)

    @property
    def scored(self) -> tuple[Branch, ...]:
        """See `SharesScore`: with one router for a layer, the attention branch has the score."""
        return ("attn",) if self.router.decides == "layer" else self.branches

    def modules(self, config: ModelConfig, branch: Branch) -> Mapping[str, nn.Module]:
        """Router and predictor of a branch that has its own score, and the adapter that replaces a skipped MLP."""
        router, width = self.router, config.hidden_size
        found: dict[str, nn.Module] = {}
        if branch in self.scored:
            name = self._name(branch)
            found[name] = RouterNet(router.net, width, router.logits, config.rms_norm_eps)
            if router.predictor is not None:
                found[f"{name}_predictor"] = RouterNet(router.predictor, width, 1, config.rms_norm_eps)
        if branch == "mlp" and router.adapter is not None:
            found["mlp_adapter"] = Mlp(width, router.adapter, False, torch.float32)
        return found

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """The first tokens of a sequence may always run; with selection by rank, K depends on the call's tokens."""
        first = before(tokens.positions, torch.tensor([self.router.full_first]))
        values = dict(forced(tokens, first))
        if self.by_rank:
            values["k"] = capacity(tokens.valid, first, inputs["budget"])
        else:
            values["bounds"] = by_token(tokens, inputs["thresholds"])
        return values

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The router's score; with one router for a layer, it is computed at the attention branch."""
        router, branch = self.router, x.branch
        passed: dict[str, Tensor] = {}
        if router.reads == "layer" and branch == "attn":
            passed["entering"] = x.hidden
            passed["entering_normed"] = x.normed
        known = {**values, **passed}
        if branch in self.scored:
            source = (x.hidden, x.normed)
            if router.reads == "layer":
                source = (known["entering"], known["entering_normed"])
            name, read = self._name(branch), source[router.input == "post_norm"]
            passed["weight"] = weight = self._weight(x.modules[name](read))
            score = weight
            if router.predictor is not None:
                score = torch.sigmoid(x.modules[f"{name}_predictor"](read)).reshape(-1)
            passed["score"] = score = apply_forced(score, values)
        else:
            score, weight = known["score"], known["weight"]
        bound = bound_of(branch if branch in self.scored else "attn", values)
        gate = weight.unsqueeze(1) if self._multiplied(branch) else None
        return BranchScore(score, bound, gate, passed)

    def skipped(self, x: BranchInput, score: BranchScore, values: Values) -> Tensor:
        """The residual stream. With an adapter, its output is added to the skipped rows. If the router multiplies what
        the whole layer adds, what attention added is multiplied here."""
        hidden = x.hidden
        if x.branch != "mlp":
            return hidden
        weight = {**values, **score.passed}["weight"].unsqueeze(1)
        if self.router.multiplies == "layer":
            entering = values["entering"]
            return entering + weight.to(hidden.dtype) * (hidden - entering)
        if self.router.adapter is None:
            return hidden
        away = torch.where((score.score > score.bound) | values["forced"], -1.0, 1.0)
        rows, index, _ = threshold_gather(x.normed, away, torch.tensor(0.0))
        share = (1 - weight if self._multiplied("mlp") else torch.ones_like(weight)).index_select(0, index)
        out = x.modules["mlp_adapter"](rows.to(torch.float32)).to(rows.dtype)
        return gated_scatter_add(hidden, out, share.to(rows.dtype), index)

    def _name(self, branch: Branch) -> str:
        return "router" if self.router.decides == "layer" else f"{branch}_router"

    def _multiplied(self, branch: Branch) -> bool:
        """Whether the router's weight multiplies a branch's output for kept rows."""
        multiplies = self.router.multiplies
        return multiplies == "branch" or (branch == "mlp" and multiplies in ("mlp", "layer"))

    def _weight(self, logits: Tensor) -> Tensor:
        """[N, 1 or 2] -> [N]."""
        output = self.router.output
        if self.router.logits == 1:
            return torch.sigmoid(logits).reshape(-1) if output == "sigmoid" else logits.reshape(-1)
        keep = self.router.keep_logit
        lead = logits[:, keep] - logits[:, 1 - keep]
        return torch.sigmoid(lead) if output == "softmax" else lead


def capacity(valid: Tensor, first: Tensor, budget: Tensor) -> Tensor:
    """Number of rows that selection by rank keeps in a call, [1] int64: Mixture-of-Depths' capacity.

    `max(1, floor(budget x n))` of n tokens (0 if n = 0), computed in whole millionths; the first tokens, which always
    run, are added on top.

    Args: valid [N] bool, false for padding; first [N] bool; budget [] float32.
    """
    n = (valid & ~first).sum()
    millionths = torch.round(budget * 1e6).to(torch.int64).clamp(max=1_000_000)
    # As an operator: torch.div with a rounding mode becomes a float32 division in ONNX.
    best = torch.minimum(((millionths * n) // 1_000_000).clamp(min=1), n)
    return (best + (valid & first).sum()).reshape(1)
