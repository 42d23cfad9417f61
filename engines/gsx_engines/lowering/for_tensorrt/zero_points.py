"""Weights in blocks with zero-points, for TensorRT, which takes only blocks whose zero-points are 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, make_node


def load_zero_points(model: onnx.ModelProto, directory: Path) -> None:
    """Read the scales and zero-points of blocks into a model, for `without_zero_points`; weights stay external.

    Args: directory: where the model's external data is.
    """
    graph = Graph(model.graph)
    for dequantize in filter(_has_zero_points, graph.nodes):
        for name in dequantize.input[1:]:
            tensor = graph.constants[name]
            if uses_external_data(tensor):
                load_external_data_for_tensor(tensor, str(directory))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
    graph.store()


def without_zero_points(graph: Graph, task: Task) -> int:
    """Take the zero-points of blocks out of the weights.

        MatMul(x, DequantizeLinear(codes, scales, zero-points))      becomes
        Sub(MatMul(x, DequantizeLinear(codes, scales)), MatMul(sums of x over each block, scales * zero-points))

    It is the same in exact arithmetic: x (s (q - z)) = x (s q) - (sum of x) (s z) for each block. The second product
    has one input where the first has a block of them.

    Returns: the number of products.
    """
    sums: dict[tuple[str, int], str] = {}
    found = list(_products(graph))
    for product, dequantize in found:
        codes, scales, zeros = graph.expect_inputs(dequantize, 3)
        by_block, points = (numpy_helper.to_array(graph.constants[name]) for name in (scales, zeros))
        offsets, size = f"{codes}.offsets", _block_size(dequantize)
        graph.add_constant(offsets, (by_block.astype(np.float32) * points.astype(np.float32)).astype(by_block.dtype))
        value = product.input[0]
        if (value, size) not in sums:
            sums[value, size] = summed = f"{value}.sums.{size}"
            axis, shape, blocks = f"{summed}.axis", f"{summed}.shape", f"{summed}.blocks"
            graph.add_constant(axis, np.array([-1], np.int64))
            outer = [0] * (by_block.ndim - 1)  # rows and, in a product of all experts, these
            graph.add_constant(shape, np.array([*outer, by_block.shape[-2], size], np.int64))
            graph.insert_before(
                product,
                make_node("Reshape", [value, shape], blocks),
                make_node("ReduceSum", [blocks, axis], summed, keepdims=0),
            )
        graph.set_inputs(dequantize, [codes, scales])
        out, uncorrected, correction = (f"{product.output[0]}{part}" for part in ("", ".uncorrected", ".correction"))
        graph.replace(
            product,
            helper.make_node("MatMul", list(product.input), [uncorrected], name=product.name),
            make_node("MatMul", [sums[value, size], offsets], correction),
            make_node("Sub", [uncorrected, correction], out),
        )
    return len(found)


def _products(graph: Graph) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Every MatMul whose weight has zero-points, with the node that dequantizes it."""
    for node in graph.nodes:
        dequantize = graph.producer(node.input[1]) if node.op_type == "MatMul" else None
        if dequantize is not None and _has_zero_points(dequantize):
            yield node, dequantize


def _has_zero_points(node: onnx.NodeProto) -> bool:
    return node.op_type == "DequantizeLinear" and len(node.input) == 3 and bool(_block_size(node))


def _block_size(dequantize: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in dequantize.attribute if attribute.name == "block_size"), 0)
