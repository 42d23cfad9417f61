"""Finds products of quantized values in a graph, by the pattern that docs/quantization.md describes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from gsx_plugins.graph import Graph


def quantized_products(graph: Graph) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]]:
    """Every MatMul of two dequantized values, with the nodes that dequantize rows and weights."""
    for node in graph.nodes:
        if node.op_type != "MatMul":
            continue
        left, right = (graph.producer(name) for name in node.input)
        if left is not None and right is not None and left.op_type == right.op_type == "DequantizeLinear":
            yield node, left, right
