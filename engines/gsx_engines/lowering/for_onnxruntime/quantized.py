"""Products in 8 bits, in the form that ONNX Runtime has fast CPU kernels for.

In the portable graph a quantized product is a MatMul between DequantizeLinear nodes, with codes of type int8. ONNX
Runtime's x86 kernels are fast only for uint8 activations (int8 with int8 took four times as long as float32), and its
own rewriting gives up where several products read one quantized value. So the contrib op is written here.
(Measured: docs/quantization.md.)
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from gsx_engines.lowering.for_onnxruntime.probe import products_saturate
from gsx_engines.lowering.for_onnxruntime.task import CONTRIB
from gsx_engines.lowering.products import quantized_products
from gsx_plugins.graph import Graph, make_node

# int8 code + 128 is the uint8 code of the same number.
_MIDDLE = "lowered.middle_code"


def fuse_products(graph: Graph) -> int:
    """Turn a product of 8-bit rows and 8-bit weights into the contrib op that has a fast kernel.

        MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes))      becomes
        MatMulIntegerToFloat(QuantizeLinear(x) as uint8, codes, both scales)

    The replaced nodes are removed at once, since they would keep their inputs outside of a branch. Products in which
    only weights are quantized, and types other than int8, stay as they are. Returns: the number of products.
    """
    count = 0
    for node, left, right in list(quantized_products(graph)):
        quantize = graph.producer(left.input[0])
        codes = graph.constants.get(right.input[0])
        if quantize is None or codes is None or codes.data_type != TensorProto.INT8:
            continue
        value, scale, _ = graph.expect_inputs(quantize, 3)
        graph.set_inputs(quantize, [value, scale, _MIDDLE])
        node.op_type, node.domain = "MatMulIntegerToFloat", CONTRIB
        graph.set_inputs(node, [quantize.output[0], codes.name, scale, right.input[1], _MIDDLE])
        count += 1
    if count:
        graph.add_constant(_MIDDLE, np.uint8(128))
        graph.drop_unread()
    return count


def unsigned_codes(graph: Graph) -> int:
    """On CPUs whose kernel saturates (`products_saturate`), int8 weights become uint8 with a zero-point of 128.

        MatMulIntegerToFloat(rows, codes, scales, zero-point)      becomes
        MatMulIntegerToFloat(rows, BitwiseXor(bits of codes, 128), scales, zero-point, 128)

    The result is the same number: flipping the first bit of a code's byte adds 128. The bits are the stored codes read
    as uint8, so that nothing is copied here; ONNX Runtime computes the new codes once, when it loads the graph.

    Returns: how many products.
    """
    if not products_saturate():
        return 0
    count = 0
    unsigned: dict[str, str] = {}
    for part in graph.parts():
        for node in part.nodes:
            if (node.op_type, node.domain) == ("MatMulIntegerToFloat", CONTRIB) and node.input[1] in graph.constants:
                codes = node.input[1]
                unsigned.setdefault(codes, f"{codes}.unsigned")
                part.set_inputs(node, [node.input[0], unsigned[codes], *node.input[2:5], _MIDDLE])
                count += 1
    for codes, name in unsigned.items():
        bits = TensorProto()
        bits.CopyFrom(graph.constants[codes])
        bits.name, bits.data_type = f"{codes}.bits", TensorProto.UINT8
        graph.add_tensor(bits)
        graph.prepend(make_node("BitwiseXor", [bits.name, _MIDDLE], name))
    graph.remove_constants(codes for codes in unsigned if not graph.users(codes))
    return count


def weights_inside(graph: Graph) -> int:
    """Turn weights that are dequantized inside a branch into constants of the branch.

    Why: there ONNX Runtime fuses DequantizeLinear and MatMul. Returns: how many tensors moved.
    """
    moved: set[str] = set()
    for node in graph.nodes:
        for branch in graph.branches(node).values():
            inside = [inner for inner in branch.nodes if inner.op_type == "DequantizeLinear"]
            names = [name for inner in inside for name in inner.input if name in graph.constants]
            for name in names:
                branch.add_tensor(graph.constants[name])
            moved.update(names)
    graph.remove_constants(name for name in moved if not graph.users(name))
    return len(moved)
