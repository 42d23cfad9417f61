"""Gates that begin with a guess: how much a branch changes a token, predicted from what the gate reads.

A random gate skips tokens at random. What rules without training rank tokens by, the change of the residual stream
(docs/methods.md 5 and 10), is known after the branch only; a gate can predict it. So each gate begins as the ridge
regression of the logarithm of |f(x)| / |h| on its input, over some tokens of the text. Each is solved while one forward
pass of the dense model is there, so no states are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gsx_engines.bundle.words import Branch
from gsx_exporter.config import ModelConfig
from gsx_exporter.training.gated import MODULES, gate_name, is_constant

# Tokens that the regression reads: its cost grows with their cube.
TOKENS = 1024
# Added to the diagonal, as a share of its mean: fewer tokens than inputs must not be fitted exactly.
RIDGE = 0.1


def predict_changes(hf: Any, config: ModelConfig, ids: Tensor, *, bias: float) -> None:
    """Set the gates of a model; those that are held open stay as they are.

    Args:
        hf: transformers' model with gates, computing as the dense model.
        ids: [B, S] int64, whole rows of the text.
        bias: the mean of what a gate gives before the sigmoid; its standard deviation becomes 1.
    """
    assert config.gate is not None
    hooks = []
    for layer in hf.model.layers:
        for branch in config.gate.branches:
            if is_constant(getattr(layer, gate_name(branch))):
                continue
            fit = _Fit(layer, branch, config, bias)
            module = getattr(layer, MODULES[branch])
            hooks.append(module.register_forward_pre_hook(fit.before, with_kwargs=True))
            hooks.append(module.register_forward_hook(fit.after))
            norm = config.norms[branch].before
            if norm is not None:
                hooks.append(layer.get_submodule(norm).register_forward_pre_hook(fit.note))
    try:
        with torch.no_grad():
            hf.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


class _Fit:
    """The hooks that fit the gate of one branch."""

    def __init__(self, layer: nn.Module, branch: Branch, config: ModelConfig, bias: float) -> None:
        self._gate: Any = getattr(layer, gate_name(branch))
        self._pre_norm = config.gate is not None and config.gate.input == "pre_norm"
        self._bias = bias
        self._residual: Tensor | None = None
        self._input: Tensor | None = None

    def note(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The residual stream, which the branch's norm reads."""
        self._residual = args[0]

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the branch reads."""
        self._input = args[0] if args else kwargs["hidden_states"]

    def after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Fit, when the branch has run."""
        found = output[0] if isinstance(output, tuple) else output
        normed = self._input
        assert normed is not None
        residual = normed if self._residual is None else self._residual
        change = found.float().norm(dim=-1) / residual.float().norm(dim=-1).clamp(min=1e-6)
        x = (residual if self._pre_norm else normed).float().flatten(0, -2)
        weight, bias = _ridge(x, change.clamp(min=1e-6).log().flatten(), self._bias)
        self._gate.weight.add_(weight.to(self._gate.weight.dtype))
        self._gate.bias.fill_(bias)
        self._residual = self._input = None


def _ridge(x: Tensor, y: Tensor, mean: float) -> tuple[Tensor, float]:
    """Weight [1, H] and bias, so that predictions over these tokens have this mean and the standard deviation 1.

    Args: x [N, H], y [N].
    """
    centre = x.mean(0)
    centred, wanted = x - centre, y - y.mean()
    gram = centred @ centred.t()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = centred.t() @ torch.linalg.solve(gram, wanted)
    weight = weight / (centred @ weight).std().clamp(min=1e-6)
    return weight[None], mean - float(centre @ weight)
