"""Products in 8 bits, in the form that ONNX Runtime has fast CPU kernels for.

In the portable graph a quantized product is a MatMul between DequantizeLinear nodes, with codes of type int8. ONNX
Runtime's x86 kernels are fast for uint8 activations alone (int8 against int8 took four times as long as float32), and
its own rewriting gives up where several products read one quantized value. So the contrib op is written here.
(Measured: docs/quantization.md.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

CONTRIB = "com.microsoft"
# int8 code + 128: the same number in the same place.
_MIDDLE = "lowered.middle_code"


def fuse_products(graph: onnx.GraphProto) -> int:
    """MatMul(DQ(Q(x)), DQ(codes)) -> MatMulIntegerToFloat(Q(x) as uint8, codes), in place. Returns: how many.

    Products of weights alone, and of types other than int8, stay as they are. What is left without a reader is for
    the caller to drop.
    """
    producer = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    count = 0
    for node, left, right in quantized_products(graph):
        quantize = producer.get(left.input[0])
        codes = constants.get(right.input[0])
        if quantize is None or codes is None or codes.data_type != TensorProto.INT8:
            continue
        quantize.input[2] = _MIDDLE
        node.op_type, node.domain = "MatMulIntegerToFloat", CONTRIB
        node.input[:] = [quantize.output[0], codes.name, quantize.input[1], right.input[1], _MIDDLE]
        count += 1
    if count:
        graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), _MIDDLE))
    return count


def quantized_products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]]:
    """Every MatMul of two dequantized values, with the nodes that dequantize rows and weights."""
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        left, right = (producer.get(name) for name in node.input)
        if left is not None and right is not None and left.op_type == right.op_type == "DequantizeLinear":
            yield node, left, right


def weights_inside(graph: onnx.GraphProto) -> int:
    """Weights that are dequantized inside a branch move into it, in place: there ORT makes one product of both.

    Returns: how many tensors moved.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    moved: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type != onnx.AttributeProto.GRAPH:
                continue
            inside = [one for one in attribute.g.node if one.op_type == "DequantizeLinear"]
            names = [name for one in inside for name in one.input if name in constants]
            attribute.g.initializer.extend(constants[name] for name in names)
            moved.update(names)
    kept = [tensor for name, tensor in constants.items() if name not in moved]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return len(moved)
