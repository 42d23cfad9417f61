"""Putting other nodes into a graph: what every lowering ends with."""

from __future__ import annotations

from collections.abc import Iterable

import onnx


def copy_of(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node that no graph owns."""
    out = onnx.NodeProto()
    out.CopyFrom(node)
    return out


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make these the nodes of a graph, in order; they may be ones that live in it."""
    copies = [copy_of(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
