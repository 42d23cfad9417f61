"""The products of vector gates: 16-bit rows with 16-bit weights or INT8 codes, in float32.

A vector gate has as many weights as a projection of attention, and every token reads them. Its product is in float32,
since it decides which rows run; but its factors have 16 or 8 bits. So a step reads the weights as they are stored, and
other calls may use TensorFloat-32: its 10 bits of mantissa hold these factors exactly, and its sums are float32.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from gsx_engines.lowering.for_tensorrt.step_weights import (
    StepWeights,
    as_codes,
    has_codes,
    has_step_plugins,
    step_product,
)
from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, attribute, make_node

_ONE = "lowered.one_float"


def multiply_gates(graph: Graph, task: Task) -> int:
    """Let gates of a 16-bit graph multiply numbers as they are stored.

        MatMul(Cast(x), Cast(W))      becomes      GateLinear(x, W)      in a step with plugins
        MatMul(Cast(x), Cast(codes) * scales)      becomes      GateLinearInt8(x, codes, scales)      there, else
        MatMul(Cast(x), DequantizeLinear(codes, 1)) * scales

    Returns: the number of products.
    """
    steps = has_step_plugins(task)

    def multiplied(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        rows = _narrow(graph, task, node)
        if rows is None:
            return None
        out, weight = node.output[0], graph.producer(node.input[1])
        if weight is None:
            return None
        if weight.op_type == "Cast":
            stored = graph.constants.get(weight.input[0])
            if not steps or stored is None or stored.data_type != task.float_type or stored.dims[1] == 1:
                return None  # a scalar gate's product joins its neighbours
            return [step_product("GateLinear", [rows], [StepWeights("rows", (stored.name,))], out)]
        floats = graph.producer(weight.input[0]) if weight.op_type == "Mul" else None
        codes = graph.constants.get(floats.input[0]) if floats is not None and floats.op_type == "Cast" else None
        scales = graph.constants.get(weight.input[1])
        if codes is None or scales is None or codes.data_type != TensorProto.INT8 or len(scales.dims) != 1:
            return None
        if steps and has_codes(graph, codes.name):
            return [step_product("GateLinear", [rows], [as_codes(graph, codes, scales)], out)]
        if _ONE not in graph.constants:
            graph.add_constant(_ONE, np.float32(1))
        floats_out, unscaled = f"{out}.codes", f"{out}.unscaled"
        return [
            make_node("DequantizeLinear", [codes.name, _ONE], floats_out),
            onnx.helper.make_node("MatMul", [node.input[0], floats_out], [unscaled], name=node.name),
            make_node("Mul", [unscaled, scales.name], out),
        ]

    return graph.rewrite(multiplied)


def exact_in_tf32(graph: Graph) -> bool:
    """Whether a graph has float32 products, and TensorFloat-32 holds all their factors: 16-bit numbers, or codes.

    Products of two computed values are not looked at: those that lowering makes are in the graph's own type.
    """
    found = False
    for node in graph.nodes:
        if node.op_type != "MatMul":
            continue
        constant, weight = graph.constants.get(node.input[1]), graph.producer(node.input[1])
        if constant is not None and constant.data_type == TensorProto.FLOAT:
            return False
        if weight is None or not _is_wide(graph, weight):
            continue
        exact = weight.op_type == "Cast" or _ONE in weight.input
        rows = graph.producer(node.input[0])
        if not exact or rows is None or rows.op_type != "Cast":
            return False
        found = True
    return found


def _is_wide(graph: Graph, weight: onnx.NodeProto) -> bool:
    """Whether the weight that a Cast or a DequantizeLinear makes is float32."""
    if weight.op_type == "Cast":
        return attribute(weight, "to") == TensorProto.FLOAT
    scales = graph.constants.get(weight.input[1]) if weight.op_type == "DequantizeLinear" else None
    return scales is not None and scales.data_type == TensorProto.FLOAT


def _narrow(graph: Graph, task: Task, node: onnx.NodeProto) -> str | None:
    """The 16-bit rows that a product widens to float32, or None."""
    if node.op_type != "MatMul" or task.float_type == TensorProto.FLOAT:
        return None
    cast = graph.producer(node.input[0])
    return (
        cast.input[0]
        if cast is not None and cast.op_type == "Cast" and attribute(cast, "to") == TensorProto.FLOAT
        else None
    )
