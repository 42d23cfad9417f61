"""The products of scalar gates in a step: one column, written as a sum.

TensorRT joins a matrix product with one column to the norm before it for one token, but for several it may choose a
kernel for matrices, with a copy before it and one behind: three kernels more in each branch (TensorRT-RTX 1.7.1, 3
tokens of hidden size 4,096; at 1,024 it does not). A sum joins the norm at every size.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, make_node


def sum_scalar_gates(graph: Graph, task: Task) -> int:
    """Write products with one column as sums.

        MatMul(x [.., H], W [H, 1])      becomes      ReduceSum(x * W as [H]) over the last axis, [.., 1]

    Only in steps: of many tokens, a kernel for matrices reads W less often. Returns: how many.
    """
    if task.step is None:
        return 0

    def summed(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "MatMul" or not _has_one_column(graph, node.input[1]):
            return None
        rows, weight = node.input
        name = f"{node.name}."
        flat, last = graph.add_constant("lowered.flat", [-1]), graph.add_constant("lowered.last", [-1])
        return [
            make_node("Reshape", [weight, flat], f"{name}column"),
            make_node("Mul", [rows, f"{name}column"], f"{name}terms"),
            make_node("ReduceSum", [f"{name}terms", last], node.output[0], keepdims=1),
        ]

    return graph.rewrite(summed)


def _has_one_column(graph: Graph, name: str) -> bool:
    """Whether a value is a float32 constant [H, 1], as gates are in graphs of all types. The gate of an expert for all
    tokens has the graph's type: in 16 bits a sum takes a kernel more there."""
    constant = graph.constants.get(name)
    return constant is not None and constant.data_type == TensorProto.FLOAT and list(constant.dims[1:]) == [1]
