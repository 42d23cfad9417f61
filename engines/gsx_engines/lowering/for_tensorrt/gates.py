"""The products of vector gates: 16-bit rows with 16-bit weights or INT8 codes, in float32.

A vector gate has as many weights as a projection of attention, and every token reads them, unless a linear score
decides in its place. Its product is in float32, since it decides which rows run; but its factors have 16 or 8 bits. So
a step reads the weights as they are stored, and other calls may use TensorFloat-32: its 10 bits of mantissa hold these
factors exactly, and its sums are float32.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from gsx_engines.lowering.for_tensorrt.predicated import Decision, decision_of
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
_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Ops that give some numbers of their first input; and which input of an op has its output's type.
_MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Gather", "Split", "Expand")
_TYPED_BY = {
    **dict.fromkeys((*_MOVES, "Add", "Concat", "Div", "MatMul", "Max", "Mul", "Neg", "RMSNormalization"), 0),
    **dict.fromkeys(("RotaryEmbedding", "Sigmoid", "Softmax", "Sub", "Tanh", "TensorScatter"), 0),
    **dict.fromkeys(("DequantizeLinear", "Where"), 1),
}


def multiply_gates(graph: Graph, task: Task) -> int:
    """Let gates of a 16-bit graph multiply numbers as they are stored.

        MatMul(Cast(x), Cast(W))      becomes      GateLinear(x, W)      in a step with plugins, or
        Cast(SkipLinear(x, W))      there, of rows that a linear score keeps: it no longer decides, and may be rounded
        MatMul(Cast(x), Cast(codes) * scales)      becomes      GateLinearInt8(x, codes, scales)      there, else
        MatMul(Cast(x), DequantizeLinear(codes, 1)) * scales

    Returns: the number of products.
    """
    steps = has_step_plugins(task)

    def multiplied(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        rows = _narrow(graph, task, node)
        if rows is None:
            return None
        kept = task.products_of_kept.get(node.name)
        decision = decision_of(graph, kept) if steps and kept is not None else None
        out, weight = node.output[0], graph.producer(node.input[1])
        if weight is None:
            return None
        if weight.op_type == "Cast":
            stored = graph.constants.get(weight.input[0])
            if not steps or stored is None or stored.data_type != task.float_type or stored.dims[1] == 1:
                return None  # a scalar gate's product joins its neighbours
            weights = StepWeights("rows", (stored.name,))
            return (
                [step_product("GateLinear", [rows], [weights], out)]
                if decision is None
                else _of_kept(rows, decision, weights, out)
            )
        floats = graph.producer(weight.input[0]) if weight.op_type == "Mul" else None
        codes = graph.constants.get(floats.input[0]) if floats is not None and floats.op_type == "Cast" else None
        scales = graph.constants.get(weight.input[1])
        if codes is None or scales is None or codes.data_type != TensorProto.INT8 or len(scales.dims) != 1:
            return None
        if steps and has_codes(graph, codes.name):
            weights = as_codes(graph, codes, scales)
            if decision is None:
                return [step_product("GateLinear", [rows], [weights], out)]
            packed, wide = weights.inputs
            narrow = make_node("Cast", [wide], f"{out}.scales", to=task.float_type)
            weights = StepWeights(weights.form, (packed, narrow.output[0]))
            return [narrow, *_of_kept(rows, decision, weights, out)]
        if _ONE not in graph.constants:
            graph.add_constant(_ONE, np.float32(1))
        floats_out, unscaled = f"{out}.codes", f"{out}.unscaled"
        return [
            make_node("DequantizeLinear", [codes.name, _ONE], floats_out),
            onnx.helper.make_node("MatMul", [node.input[0], floats_out], [unscaled], name=node.name),
            make_node("Mul", [unscaled, scales.name], out),
        ]

    return graph.rewrite(multiplied)


def _of_kept(rows: str, decision: Decision, weights: StepWeights, out: str) -> list[onnx.NodeProto]:
    """A gate's product in kept rows, 0 in the others."""
    narrow = f"{out}.kept"
    return [
        step_product("SkipLinear", [rows, decision.score, decision.bound], [weights], narrow),
        make_node("Cast", [narrow], out, to=TensorProto.FLOAT),
    ]


def exact_in_tf32(graph: Graph) -> bool:
    """Whether a graph has float32 products, and TensorFloat-32 holds all their factors: 16-bit numbers, or codes.

    Both factors of a product have one type, so it is enough to know one of 16 bits. Where neither is known, the product
    counts as one of float32.
    """
    found = False
    for node in graph.nodes:
        if node.op_type != "MatMul" or not {_type_of(graph, name) for name in node.input}.isdisjoint(_NARROW):
            continue
        if not all(_is_exact(graph, name) for name in node.input):
            return False
        found = True
    return found


def _type_of(graph: Graph, value: str) -> int | None:
    """The type of a value, as far as its producers tell."""
    while (node := graph.producer(value)) is not None:
        if node.op_type == "Cast":
            return attribute(node, "to")
        if node.op_type not in _TYPED_BY:
            return None
        value = node.input[_TYPED_BY[node.op_type]]
    constant = graph.constants.get(value)
    return None if constant is None else constant.data_type


def _is_exact(graph: Graph, value: str) -> bool:
    """Whether the numbers of a float32 value have 16 bits, or are codes."""
    while (node := graph.producer(value)) is not None and node.op_type in _MOVES:
        value = node.input[0]
    if node is None:
        return False
    if node.op_type == "Cast":
        kind = _type_of(graph, node.input[0])
        # Rows whose type is not known are the graph's own, of 16 bits, or the Cast would not be there.
        return kind in (None, *_NARROW, TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
    return node.op_type == "DequantizeLinear" and _ONE in node.input


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
