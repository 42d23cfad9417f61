"""Products in 8 bits, in the forms that ONNX Runtime has fast CPU kernels for.

In the portable graph a quantized product is a MatMul between DequantizeLinear nodes, with codes of type int8. ONNX
Runtime's x86 kernels are fast only for uint8 activations (int8 with int8 took four times as long as float32), and its
own rewriting gives up where several products read one quantized value. So the contrib op is written here.
(Measured: docs/quantization.md.)
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from gsx_engines.lowering.for_onnxruntime.probe import products_saturate
from gsx_engines.lowering.for_onnxruntime.task import CONTRIB
from gsx_engines.lowering.products import quantized_products
from gsx_plugins.graph import Graph, attribute, make_node

# int8 code + 128 is the uint8 code of the same number.
_MIDDLE = "lowered.middle_code"
# Constants of a row's scale: the channels' axis, and the number of which the largest code is 1.
_CHANNELS, _STEP = "lowered.channels", "lowered.code_step"
# Block sizes of a shared table: the first that divides the width is taken. Inputs that are rounded by 32, not by 64,
# lose an eighth less of SmolLM2's KL divergence, and take as long (benchmarks/RESULTS.md).
_TABLE_BLOCKS = (32, 16)
# How ONNX Runtime's blocks are padded to whole ones, if none divides it.
_PADDED_BLOCK = 32


def fuse_products(graph: Graph) -> int:
    """Turn a product of 8-bit rows and 8-bit weights into the contrib op that has a fast kernel.

        MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes))      becomes
        Mul(MatMulIntegerToFloat(QuantizeLinear(x / m) as uint8, codes, 1 / 127, scales), m), m = max(|row of x|)

    Why a scale for each row: the graph's own scale is for the largest value of any token, as TensorRT wants it; most
    rows have far smaller ones and would use a few of the 127 steps. A row's scale depends on no other row, so that a
    token's numbers do not depend on what else is in the call. A row of zeros gets any codes, and then m = 0.

    The replaced nodes are removed at once, since they would keep their inputs outside of a branch. Products in which
    only weights are quantized, and types other than int8, stay as they are. Returns: the number of products.
    """
    count = 0
    scales: dict[str, str] = {}  # quantized rows -> their scales
    for node, left, right in list(quantized_products(graph)):
        quantize = graph.producer(left.input[0])
        codes = graph.constants.get(right.input[0])
        if quantize is None or codes is None or codes.data_type != TensorProto.INT8:
            continue
        rows = quantize.output[0]
        if rows not in scales:
            scales[rows] = f"{rows}.scales"
            _scale_rows(graph, quantize, scales[rows])
        unscaled = f"{node.output[0]}.unscaled"
        inputs = [rows, codes.name, _STEP, right.input[1], _MIDDLE]
        graph.replace(
            node,
            helper.make_node("MatMulIntegerToFloat", inputs, [unscaled], name=node.name, domain=CONTRIB),
            make_node("Mul", [unscaled, scales[rows]], node.output[0]),
        )
        count += 1
    if count:
        graph.add_constant(_MIDDLE, np.uint8(128))
        graph.add_constant(_CHANNELS, np.array([-1], np.int64))
        graph.add_constant(_STEP, np.float32(1 / 127))
        graph.drop_unread()
    return count


def _scale_rows(graph: Graph, quantize: onnx.NodeProto, scales: str) -> None:
    """Quantize each row as a share of its largest value; `scales` [rows, 1] is the name of these values."""
    value, _, _ = graph.expect_inputs(quantize, 3)
    sizes, scaled = f"{scales}.sizes", f"{scales}.scaled"
    nodes = [
        make_node("Abs", [value], sizes),
        make_node("ReduceMax", [sizes, _CHANNELS], scales, keepdims=1),
        make_node("Div", [value, scales], scaled),
    ]
    graph.insert_before(quantize, *nodes)
    graph.set_inputs(quantize, [scaled, _STEP, _MIDDLE])


def shared_table(graph: Graph) -> int:
    """Make a head whose table the embedding shares the product that reads 8-bit weights as they are stored.

        MatMul(x, Transpose(DequantizeLinear(codes, scales)))      becomes
        MatMulNBits(x, codes as uint8 in blocks, scales of blocks)

    The table [rows, width] is the op's own layout of weights, and so are its scales if they are those of blocks. A
    row's scale becomes that of each block.

    Returns: 1 if there is such a head.
    """
    for node in list(graph.nodes):
        transpose = graph.producer(node.input[1]) if node.op_type == "MatMul" else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        dequantize = graph.producer(transpose.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        codes, scales = (graph.constants[name] for name in dequantize.input[:2])
        rows, width = codes.dims
        by_block = attribute(dequantize, "block_size")
        size = by_block or next((size for size in _TABLE_BLOCKS if width % size == 0), _PADDED_BLOCK)
        blocks, padding = -(-width // size), list[onnx.NodeProto]()
        table = "lowered.head"
        bits = _as_unsigned(graph, codes)
        if blocks * size > width:
            graph.add_constant(f"{table}.pads", np.array([0, 0, 0, blocks * size - width], np.int64))
            padding = [make_node("Pad", [bits, f"{table}.pads"], f"{table}.padded")]
            bits = f"{table}.padded"
        graph.add_constant(f"{table}.blocks", np.array([rows, blocks, size], np.int64))
        graph.add_constant(f"{table}.by_block", np.array([rows, blocks], np.int64))
        graph.add_constant(f"{table}.column", np.array([-1, 1], np.int64))
        graph.add_constant(_MIDDLE, np.uint8(128))
        graph.prepend(
            *padding,
            make_node("BitwiseXor", [bits, _MIDDLE], f"{table}.codes"),
            make_node("Reshape", [f"{table}.codes", f"{table}.blocks"], f"{table}.weights"),
        )
        if not by_block:
            graph.prepend(
                make_node("Reshape", [scales.name, f"{table}.column"], f"{table}.row_scales"),
                make_node("Expand", [f"{table}.row_scales", f"{table}.by_block"], f"{table}.scales"),
            )
        inputs = [node.input[0], f"{table}.weights", scales.name if by_block else f"{table}.scales"]
        form: dict[str, int] = {"K": width, "N": rows, "bits": 8, "block_size": size, "accuracy_level": 4}
        product = helper.make_node("MatMulNBits", inputs, list(node.output), name=node.name, domain=CONTRIB, **form)
        graph.replace(node, product)
        graph.drop_unread()
        return 1
    return 0


def _as_unsigned(graph: Graph, codes: TensorProto) -> str:
    """A constant with the bits of int8 codes, as uint8; nothing is copied."""
    bits = TensorProto()
    bits.CopyFrom(codes)
    bits.name, bits.data_type = f"{codes.name}.bits", TensorProto.UINT8
    graph.add_tensor(bits)
    return bits.name


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
        graph.prepend(make_node("BitwiseXor", [_as_unsigned(graph, graph.constants[codes]), _MIDDLE], name))
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
