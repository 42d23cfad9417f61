"""Products of one value as one product.

Q, K and V are products of the same rows. On a thin model each is so small that starting it, and the nodes around it,
cost as much as its numbers, so they become one product with all columns. Gate and up projection stay two: they are
large, and cutting their common result apart would copy it in prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from onnx import TensorProto, helper

from gsx_engines.lowering.for_onnxruntime.task import CONTRIB
from gsx_plugins.graph import Graph, attribute, make_node

# Attention's projections, as the exporter names their weights, in the order in which attention takes their results.
_OF_ATTENTION = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")


def pack_products(graph: Graph) -> int:
    """Make one product of attention's products of one value.

        x, W1 -> MatMul -> y1; x, W2 -> MatMul -> y2; ..      becomes
        x, Concat(W1, W2, ..) -> MatMul -> Split -> y1, y2, ..

    also where weights are dequantized, or the product is MatMulIntegerToFloat, and with biases and scales of rows that
    follow: these are packed as well. ONNX Runtime computes the Concat once, when it loads the graph. 4-bit codes stay
    apart, since Concat has no kernel for them.

    Why: starting a product costs a step more than the columns of K and V. Returns: how many products went into others.
    """
    count = 0
    shared: dict[tuple[str, ...], str] = {}
    for part in graph.parts():
        for number, products in enumerate(_of_one_value(graph, part)):
            count += _pack(graph, part, products, f"lowered.packed.{part.proto.name}.{number}", shared)
    graph.drop_unread()
    return count


def _of_one_value(graph: Graph, part: Graph) -> list[list[onnx.NodeProto]]:
    """The products to pack, by what they read."""
    found: dict[tuple[object, ...], list[onnx.NodeProto]] = {}
    for node in part.nodes:
        kind = _kind(graph, part, node)
        if kind is not None:
            found.setdefault((node.input[0], *kind), []).append(node)
    return [products for products in found.values() if len(products) > 1]


def _weight(part: Graph, node: onnx.NodeProto) -> str:
    """The name of a product's weights, or of their codes."""
    dequantize = part.producer(node.input[1]) if node.op_type == "MatMul" else None
    return node.input[1] if dequantize is None else dequantize.input[0]


def _place(weight: str) -> int | None:
    """Where attention takes the product with a weight, Q first; None for weights of other parts."""
    return next((place for place, name in enumerate(_OF_ATTENTION) if name in weight), None)


def _kind(graph: Graph, part: Graph, node: onnx.NodeProto) -> tuple[object, ...] | None:
    """What products must have in common to be packed; None for anything else, and for other parts of the model."""
    if node.op_type not in ("MatMul", "MatMulIntegerToFloat"):
        return None
    form: tuple[object, ...] = (node.op_type, *node.input[2:3], *node.input[4:])
    dequantize = part.producer(node.input[1]) if node.op_type == "MatMul" else None
    if dequantize is not None:
        if dequantize.op_type != "DequantizeLinear":
            return None
        form += (len(dequantize.input), attribute(dequantize, "axis", 1), attribute(dequantize, "block_size"))
    weight = _weight(part, node)
    codes = _constant(graph, part, weight)
    if codes is None or len(codes.dims) != 2 or _place(weight) is None:
        return None
    four_bits = codes.data_type in (TensorProto.INT4, TensorProto.UINT4)
    return None if four_bits else (*form, codes.data_type, codes.dims[0])


def _constant(graph: Graph, part: Graph, name: str) -> TensorProto | None:
    """The constant that a value is, or is computed from when the graph is loaded (`quantized.unsigned_codes`)."""
    changed = graph.producer(name)
    if changed is not None and changed.op_type == "BitwiseXor":
        name = changed.input[0]
    return part.constants.get(name) or graph.constants.get(name)


def _pack(
    graph: Graph, part: Graph, products: Sequence[onnx.NodeProto], name: str, shared: dict[tuple[str, ...], str]
) -> int:
    """Replace products by one. Args: shared: weights that were put together already, by what they consist of."""
    earliest = products[0]
    products = sorted(products, key=lambda node: _place(_weight(part, node)) or 0)
    tensors = [_constant(graph, part, _weight(part, node)) for node in products]
    widths = [tensor.dims[1] for tensor in tensors if tensor is not None]
    first, made, joined = products[0], f"{name}.product", list[onnx.NodeProto]()

    def together(which: Iterator[str] | Sequence[str], what: str, axis: int) -> str:
        joined.append(make_node("Concat", list(which), f"{name}.{what}", axis=axis))
        return f"{name}.{what}"

    if first.op_type == "MatMulIntegerToFloat":
        codes = together([node.input[1] for node in products], "codes", 1)
        scales = together([node.input[3] for node in products], "scales", 0)
        inputs = [first.input[0], codes, first.input[2], scales, *first.input[4:]]
        joined.append(helper.make_node(first.op_type, inputs, [made], name=made, domain=CONTRIB))
    else:
        spread = [part.producer(node.input[1]) for node in products]
        dequantize = spread[0]
        if dequantize is None:
            names = tuple(node.input[1] for node in products)
            weights = shared.get(names, f"{name}.weights")
            if names not in shared and all(one in graph.constants for one in names):
                # Outside of all branches: in a looped model, those of other loops read it too.
                graph.prepend(make_node("Concat", names, weights, axis=1))
                shared[names] = weights
            elif names not in shared:
                together(names, "weights", 1)
        else:
            columns = 1 if attribute(dequantize, "block_size") else 0  # of the scales: [blocks, out], or [out]
            kinds = ("codes", "scales", "zeros")[: len(dequantize.input)]
            parts = [
                together([one.input[place] for one in spread if one is not None], what, columns if place else 1)
                for place, what in enumerate(kinds)
            ]
            weights = f"{name}.weights"
            joined.append(helper.make_node("DequantizeLinear", parts, [weights], name=weights))
            joined[-1].attribute.extend(dequantize.attribute)
        joined.append(make_node("MatMul", [first.input[0], weights], made))
    ends = [node.output[0] for node in products]
    replaced = list(products)
    for level in range(2):  # a scale of rows, a bias
        following = _following(graph, part, ends)
        if following is None:
            break
        shared, added = following[0].op_type == "Mul", f"{name}.level.{level}"
        other = following[0].input[1]
        if not shared:
            other = together([node.input[1] for node in following], f"biases.{level}", 0)
        joined.append(make_node(following[0].op_type, [made, other], added))
        made, ends = added, [node.output[0] for node in following]
        replaced += following
    sizes = graph.add_constant(f"{name}.widths", widths)
    joined.append(helper.make_node("Split", [made, sizes], ends, name=f"{name}.split", axis=-1))
    gone = {id(node) for node in replaced}
    part.rewrite(lambda node: joined if node is earliest else [] if id(node) in gone else None)
    return len(products) - 1


def _following(graph: Graph, part: Graph, ends: Sequence[str]) -> list[onnx.NodeProto] | None:
    """The nodes behind the products that can be packed too: a product with the same scales, or a bias each."""
    readers = [part.users(end) for end in ends]
    if any(len(nodes) != 1 or nodes[0].input[0] != end for nodes, end in zip(readers, ends, strict=True)):
        return None
    following = [nodes[0] for nodes in readers]
    kinds, others = {node.op_type for node in following}, [node.input[1:2] for node in following]
    if kinds == {"Mul"} and len({tuple(other) for other in others}) == 1:
        return following
    biases = [_constant(graph, part, other[0]) for other in others if other]
    if kinds == {"Add"} and all(one is not None and len(one.dims) == 1 for one in biases):
        return following
    return None
