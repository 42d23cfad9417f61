"""What the lowered forms of routed experts share: which experts each row goes to, and with which shares."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from gsx_plugins.graph import Graph, attribute, make_node

_LAST_AXIS = "lowered.experts.last_axis"


def value_of(node: onnx.NodeProto, what: str) -> str:
    """The name of a value that the form of a RoutedExperts node is made of."""
    return f"{node.output[0]}.experts.{what}"


@dataclass(frozen=True)
class Choice:
    """The nodes that choose. Args: shares, chosen: names of [K, top_k] float32 and int64, the best expert first."""

    nodes: list[onnx.NodeProto]
    shares: str
    chosen: str


def choose(graph: Graph, node: onnx.NodeProto) -> Choice:
    """Let a RoutedExperts node's logits choose.

    logits -> Softmax -> TopK -> (divided by their sum, if the node says so) -> shares, chosen
    """
    probabilities, best, chosen = (value_of(node, what) for what in ("probabilities", "best", "chosen"))
    count = graph.add_constant(value_of(node, "k"), [attribute(node, "top_k")])
    nodes = [
        make_node("Softmax", [node.input[1]], probabilities, axis=-1),
        helper.make_node("TopK", [probabilities, count], [best, chosen], name=best),
    ]
    if not attribute(node, "normalized"):
        return Choice(nodes, best, chosen)
    total, shares = value_of(node, "total"), value_of(node, "shares")
    last = graph.add_constant(_LAST_AXIS, [-1])
    nodes.append(make_node("ReduceSum", [best, last], total, keepdims=1))
    nodes.append(make_node("Div", [best, total], shares))
    return Choice(nodes, shares, chosen)
