"""Products in 8 bits, in the form that ONNX Runtime has fast CPU kernels for.

In the portable graph a quantized product is a MatMul between DequantizeLinear nodes, with codes of type int8. ONNX
Runtime's x86 kernels are fast for uint8 activations alone (int8 against int8 took four times as long as float32), and
its own rewriting gives up where several products read one quantized value. So the contrib op is written here.
(Measured: docs/quantization.md.)
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from gsx_engines.lowering.for_onnxruntime.task import CONTRIB
from gsx_engines.lowering.products import quantized_products
from gsx_plugins.graph import Graph

# int8 code + 128: the same number in the same place.
_MIDDLE = "lowered.middle_code"


def fuse_products(graph: Graph) -> int:
    """A product of 8-bit rows and 8-bit weights becomes the contrib op that has a fast kernel.

        MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes))      becomes
        MatMulIntegerToFloat(QuantizeLinear(x) as uint8, codes, both scales)

    What was replaced goes at once, or it would hold its inputs outside of a branch. Products of weights only, and of
    types other than int8, stay as they are. Returns: how many products.
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


def weights_inside(graph: Graph) -> int:
    """Weights that are dequantized inside a branch become constants of the branch.

    Why: there ONNX Runtime makes one product of DequantizeLinear and MatMul. Returns: how many tensors moved.
    """
    moved: set[str] = set()
    for node in graph.nodes:
        for branch in graph.branches(node).values():
            inside = [one for one in branch.nodes if one.op_type == "DequantizeLinear"]
            names = [name for one in inside for name in one.input if name in graph.constants]
            for name in names:
                branch.add_tensor(graph.constants[name])
            moved.update(names)
    graph.remove_constants(name for name in moved if not graph.users(name))
    return len(moved)
