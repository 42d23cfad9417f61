"""Which experts each token went to, on both sides.

A router chooses by its logits, and where two of them are nearly equal rounding may decide. A token that went to another
expert has another state from there on, and so have the tokens after it that see it: as with the decisions of a keep
rule, such tokens are left out of the numbers, and counted. A choice may differ only where the reference's logits are as
near as its states may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from gsx_engines.bundle.bundle import Bundle
from gsx_plugins.graph import attribute


@dataclass(frozen=True)
class Routes:
    """The experts of the S tokens of a sequence.

    Args:
        chosen: layer -> [S, E] bool; a token that skipped the layer's MLP has none. Only routed layers.
        margins: layer -> [S]: how far the last expert's logit is above the best one that was not chosen, over the root
            mean square of the token's logits; infinity where nothing was chosen, or everything.
    """

    chosen: Mapping[int, np.ndarray] = field(default_factory=dict)
    margins: Mapping[int, np.ndarray] = field(default_factory=dict)

    def head(self, count: int) -> Routes:
        """Only the first tokens."""
        return Routes(*({n: one[:count] for n, one in part.items()} for part in (self.chosen, self.margins)))

    def nearest(self, tokens: int) -> np.ndarray:
        """The smallest margin of each token over all layers, [S]; infinity without routed layers."""
        return np.min([np.full(tokens, np.inf), *self.margins.values()], axis=0)


def routes_of(logits: Mapping[int, np.ndarray], kept: np.ndarray, per_token: int) -> Routes:
    """The routes of one sequence.

    Args:
        logits: layer -> [S, E], of its router.
        kept: [L, S] bool: which tokens ran a layer's MLP.
        per_token: experts that a token runs through.
    """
    chosen, margins = {}, {}
    for layer, found in logits.items():
        rows = found.astype(np.float64)
        order = np.argsort(-rows, axis=1, kind="stable")
        chosen[layer] = np.zeros(rows.shape, bool)
        np.put_along_axis(chosen[layer], order[:, :per_token], True, axis=1)
        chosen[layer] &= kept[layer][:, None]
        margins[layer] = np.full(len(rows), np.inf)
        if per_token < rows.shape[1]:
            ranked = np.take_along_axis(rows, order[:, per_token - 1 : per_token + 1], axis=1)
            scale = np.sqrt(np.square(rows).mean(axis=1))
            margin = (ranked[:, 0] - ranked[:, 1]) / np.maximum(scale, np.finfo(np.float32).tiny)
            margins[layer] = np.where(kept[layer], margin, np.inf)
    return Routes(chosen, margins)


@dataclass(frozen=True)
class Router:
    """A router in a graph. Args: logits: the value's name; per_token: experts that a token runs through."""

    logits: str
    per_token: int


def routers_of(bundle: Bundle) -> dict[int, Router]:
    """The routers of a bundle's `model.onnx`, by layer; empty without experts."""
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    return {
        int(node.name.split(".")[1]): Router(node.input[1], attribute(node, "top_k"))
        for node in model.graph.node
        if node.op_type == "RoutedExperts"
    }
