"""SmoothQuant, folded into weights that exist anyway.

With one scale for the whole tensor, a channel that is far larger than the others takes all of the 127 steps. Dividing
the channel by s, and multiplying the weights that read it by s, changes nothing in exact arithmetic and gives both
sides a fair range. The rule is `s = max|x|^alpha / max|w|^(1 - alpha)` for each channel (Xiao et al., arXiv
2211.10438), with two decisions of our own:

- s is a power of two, so that dividing and multiplying are exact in any float type: a gate that reads the same norm has
  its weights multiplied too, and decides exactly as before;
- nothing is added to the graph: the division is folded into the norm before the products, or into up_proj before
  down_proj. (For o_proj that is not possible: V's scale would change the K/V cache.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import GATE_SCORE
from gsx_exporter.config import ModelConfig
from gsx_exporter.quantization.statistics import Statistics

# s is between 2^-6 and 2^6, which keeps norms and weights within the range of half precision.
_MOST_STEPS = 6


@dataclass(frozen=True)
class Site:
    """A place where channels can be divided at no cost.

    Args:
        readers: linear layers that read the channels; their weights are multiplied along the input axis.
        gates: what decides and reads them too: a gate, and its linear score.
        divided: the module whose output channels are divided: a norm, or `mlp.up_proj`.
    """

    readers: tuple[str, ...]
    gates: tuple[str, ...]
    divided: str


def sites(config: ModelConfig, layer: int) -> tuple[Site, ...]:
    """The sites of a layer, with names within `model.layers.{i}.`.

    A branch that reads the residual stream itself, without a norm, has none before its products. Inputs of experts are
    not rounded. A normalized Transformer has norms without weights everywhere, so that nothing can be divided.
    """
    if config.sphere is not None:
        return ()
    reads = config.gate is not None and config.gate.input == "post_norm"

    def gates(branch: Branch) -> tuple[str, ...]:
        if not reads or branch not in config.gated_branches:
            return ()
        linear = config.gate is not None and config.gate.score == "linear"
        return (f"{branch}_gate", *((f"{branch}_{GATE_SCORE}",) if linear else ()))

    readers: dict[Branch, tuple[str, ...]] = {"attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    inside: tuple[Site, ...] = ()
    if not config.is_routed(layer):
        readers["mlp"] = ("mlp.gate_proj", "mlp.up_proj")
        inside = (Site(("mlp.down_proj",), (), "mlp.up_proj"),)
    found = [(names, gates(branch), config.norms[branch].before) for branch, names in readers.items()]
    return (*(Site(names, gated, norm) for names, gated, norm in found if norm), *inside)


@dataclass
class SmoothedCheckpoint(Checkpoint):
    """A checkpoint that returns smoothed parameters.

    Args:
        factors: parameter name -> (axis, factors) that it is multiplied by along that axis.
    """

    factors: Mapping[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)

    def parameter(self, name: str) -> torch.Tensor:
        """See `Checkpoint`; multiplying by powers of two is exact in every type."""
        found = super().parameter(name)
        for axis, factor in self.factors.get(name, ()):
            shape = [-1 if n == axis else 1 for n in range(found.ndim)]
            found = found * torch.from_numpy(factor).to(found.dtype).reshape(shape)
        return found


def smooth(checkpoint: Checkpoint, found: Statistics, alpha: float) -> tuple[SmoothedCheckpoint, dict[str, np.ndarray]]:
    """The smoothed model, and the largest magnitudes of its inputs.

    Args: found: statistics of the unsmoothed model; alpha in [0, 1], 0 changes nothing.
    Returns: the checkpoint; linear layer -> [in], as in `Statistics.inputs`.
    """
    factors: dict[str, list[tuple[int, np.ndarray]]] = {}
    inputs = dict(found.inputs)
    for layer in range(checkpoint.config.stored_layers) if alpha else ():
        for site in sites(checkpoint.config, layer):
            readers = [f"layers.{layer}.{name}" for name in site.readers]
            sizes = np.max([found.inputs[name] for name in readers], axis=0)
            weights = np.max([found.weights[name] for name in readers], axis=0)
            s = _factor(sizes, weights, alpha)
            for name in readers:
                inputs[name] = inputs[name] / s
                factors.setdefault(f"model.{name}.weight", []).append((1, s))
            for name in site.gates:
                factors[f"model.layers.{layer}.{name}.weight"] = [(1, s)]
            for part in ("weight", "bias"):
                factors.setdefault(f"model.layers.{layer}.{site.divided}.{part}", []).append((0, 1 / s))
    values = {one.name: getattr(checkpoint, one.name) for one in fields(Checkpoint)}
    return SmoothedCheckpoint(**values, factors=factors), inputs


def _factor(sizes: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """s of each channel [in]: a power of two, float32; 1 for a channel that is zero throughout."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = alpha * np.log2(sizes) - (1 - alpha) * np.log2(weights)
    finite = np.isfinite(exponent)
    # Only the differences between channels matter: the median channel stays as it is.
    exponent = exponent - np.median(exponent[finite]) if finite.any() else exponent
    steps = np.where(finite, np.clip(np.rint(exponent), -_MOST_STEPS, _MOST_STEPS), 0)
    factor: np.ndarray = np.exp2(steps).astype(np.float32)
    return factor
