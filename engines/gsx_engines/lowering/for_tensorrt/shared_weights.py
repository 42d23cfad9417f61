"""Weights that several products of a graph read, as those of looped layers: stored once in an engine.

TensorRT makes one product of all products of one value (Q, K and V; gate and up projection), over a constant that it
puts together from their weights, and stores equal constants once. But what it puts together, and in which order,
depends on what surrounds the products, and that differs between visits of a layer: TensorRT-RTX 1.7.1 made `q, k, v` of
the first loop and `q, v, k` of later ones, and stored both. So the graph says what is put together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, attribute, copy_of, make_node


def join_shared_weights(graph: Graph, task: Task) -> int:
    """Join products that read the same value at every visit of their layer.

        x, W1 -> MatMul -> y1; x, W2 -> MatMul -> y2      becomes      x, [W1 W2] -> MatMul -> Split -> y1, y2
        and if x has been read by other products          x is         Max(x, the lowest number) -> the same numbers

    Only for weights that several products read, in floats, or as 8-bit codes with a scale for each column. [W1 W2] is a
    constant that has to be written (`write_joined`; `task.joined`), since TensorRT does not concatenate codes. Without
    the Max, which is fused into the kernel that makes x, TensorRT would also join products that read x at this visit
    only.

    Returns: how many products were merged into others.
    """
    groups, instead, read = _groups(graph), dict[int, list[onnx.NodeProto]](), set[str]()
    for visits in groups:
        constants = [_constants(graph, node) for node in visits[0]]
        joined = constants[0]
        if len(constants) > 1:
            joined = [_joined_constant(graph, task, names) for names in zip(*constants, strict=True)]
        widths = [graph.constants[names[0]].dims[1] for names in constants]
        sizes = graph.add_constant(f"{constants[0][0]}.widths", widths)
        for products in visits:
            value, nodes = products[0].input[0], list[onnx.NodeProto]()
            if value in read:
                value, nodes = _again(graph, products[0])
            read.add(products[0].input[0])
            instead |= {id(node): [] for node in products}
            instead[_earliest(graph, products)] = [*nodes, *_joined_product(graph, products, value, joined, sizes)]
    graph.rewrite(lambda node: instead.get(id(node)))
    graph.drop_unread()
    return len(instead) - sum(map(len, groups))


def write_joined(
    model: onnx.ModelProto, joined: Mapping[str, Sequence[TensorProto]], directory: Path, at: Path
) -> None:
    """Write the constants that a lowered graph puts together, and let the graph refer to them.

    Args:
        model: the graph; its weights are in files of `directory`.
        joined: the constants -> their parts, side by side.
        at: the file to write, at a place in `directory`; none if nothing was put together.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = [name for name in joined if name in constants]
    if not wanted:
        return
    with at.open("wb") as file:
        for name in wanted:
            parts = [numpy_helper.to_array(part, str(directory)) for part in joined[name]]
            where = {"location": at.relative_to(directory).as_posix(), "offset": str(file.tell())}
            where["length"] = str(file.write(np.concatenate(parts, axis=-1).tobytes()))
            tensor = constants[name]
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in where.items())


def _groups(graph: Graph) -> list[list[list[onnx.NodeProto]]]:
    """Products whose weights are read at several visits, always of one value: of each group the products by visit."""
    readers = [nodes for name in graph.constants if len(nodes := _products(graph, name)) > 1]
    together: dict[tuple[str, ...], list[list[onnx.NodeProto]]] = {}
    for nodes in readers:
        together.setdefault(tuple(node.input[0] for node in nodes), []).append(nodes)
    return [list(map(list, zip(*of_weights, strict=True))) for of_weights in together.values()]


def _products(graph: Graph, weight: str) -> list[onnx.NodeProto]:
    """The products that read a weight or its codes, in order; none if it is no matrix, or other nodes read it too."""
    users = list(graph.users(weight)) if len(graph.constants[weight].dims) == 2 else []
    values = [weight] * len(users)
    if users and all(_gives_columns(graph, node) for node in users):
        values = [node.output[0] for node in users]
        users = [reader for value in values for reader in graph.users(value)]
    matches = len(users) == len(values) and all(
        node.op_type == "MatMul" and node.input[1] == value for node, value in zip(users, values, strict=True)
    )
    return users if matches else []


def _gives_columns(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node dequantizes codes with a scale for each column (those of gates have one scale for all)."""
    if node.op_type != "DequantizeLinear" or len(node.input) != 2 or attribute(node, "block_size"):
        return False
    scales = graph.constants.get(node.input[1])
    return attribute(node, "axis", 1) == 1 and scales is not None and len(scales.dims) == 1


def _constants(graph: Graph, product: onnx.NodeProto) -> list[str]:
    """The weight of a product; or its codes and their scales."""
    dequantize = graph.producer(product.input[1])
    return [product.input[1]] if dequantize is None else list(dequantize.input)


def _joined_constant(graph: Graph, task: Task, names: Sequence[str]) -> str:
    """Several constants, [in, out] or [out], side by side in one. Its data are written later."""
    parts = [graph.constants[name] for name in names]
    dims = [*parts[0].dims[:-1], sum(part.dims[-1] for part in parts)]
    tensor = TensorProto(name=f"{names[0]}.joined", data_type=parts[0].data_type, dims=dims)
    graph.add_tensor(tensor)
    task.joined[tensor.name] = parts
    return tensor.name


def _again(graph: Graph, product: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
    """What a product reads, computed once more. The numbers are the same, but TensorRT does not see that."""
    value, name = product.input[0], f"{product.output[0]}.again"
    chain: list[onnx.NodeProto] = []
    while (node := graph.producer(value)) is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        chain.insert(0, copy_of(node))
        value = node.input[0]
    kind = graph.constants[chain[0].input[1] if chain else _constants(graph, product)[-1]].data_type
    lowest = ml_dtypes.finfo(helper.tensor_dtype_to_np_dtype(kind)).min  # type: ignore[no-untyped-call]
    made = [make_node("Max", [value, graph.add_constant("lowered.lowest", lowest)], name)]
    for place, node in enumerate(chain):
        node.input[0], node.output[0] = made[-1].output[0], f"{name}.{place}"
        node.name = node.output[0]
        made.append(node)
    return made[-1].output[0], made


def _earliest(graph: Graph, nodes: Collection[onnx.NodeProto]) -> int:
    """The id of the first of some nodes."""
    wanted = {id(node) for node in nodes}
    return next(id(node) for node in graph.nodes if id(node) in wanted)


def _joined_product(
    graph: Graph, products: Sequence[onnx.NodeProto], value: str, joined: Sequence[str], sizes: str
) -> list[onnx.NodeProto]:
    """The product with joined weights, under the first one's name, and its parts."""
    first, ends, nodes = products[0], [node.output[0] for node in products], list[onnx.NodeProto]()
    whole = ends[0] if len(ends) == 1 else f"{ends[0]}.joined"
    weight = joined[0]
    if (dequantize := graph.producer(first.input[1])) is not None:
        weight = f"{whole}.weight"
        nodes.append(helper.make_node("DequantizeLinear", list(joined), [weight], name=weight))
        nodes[0].attribute.extend(dequantize.attribute)
    nodes.append(helper.make_node("MatMul", [value, weight], [whole], name=first.name))
    if len(ends) > 1:
        nodes.append(helper.make_node("Split", [whole, sizes], ends, name=f"{whole}.split", axis=-1))
    return nodes
