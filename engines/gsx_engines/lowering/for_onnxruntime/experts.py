"""Routed experts: each one inside an `If`, which is not entered where no row chose it.

The portable graph has the weights of all experts of a layer in one tensor, and its body copies an expert's weights out
of it. Here every expert is a constant of its own, a part of the same file, so that nothing is copied, products are
packed and dequantized like any other, and an expert without rows costs its `If`. (ONNX Runtime's contrib op MoE takes
as long for one row, and longer for several: it does not pack weights. Measured: benchmarks/RESULTS.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper

from gsx_engines.lowering.experts import choose, value_of
from gsx_plugins.graph import Graph, attribute, copy_of, make_node

# Experts, inputs, outputs.
_STACK_AXES = 3
# Constants: shapes and axes, no results, and numbers.
_FLAT, _COLUMNS, _NONE = "lowered.experts.flat", "lowered.experts.columns", "lowered.experts.none"
_ZERO, _ONE, _POSITION = "lowered.experts.zero", "lowered.experts.one", "lowered.experts.position"


def spread_experts(graph: Graph) -> int:
    """Put each expert into an `If`, here and in branches.

        rows, logits, gate, up, down -> RoutedExperts -> out      becomes
        logits -> Softmax -> TopK -> shares [K, k], chosen [K, k]; chosen -> Equal(numbers) -> which pairs are whose
        of each expert: any pair -> If (then: Compress -> its rows -> Gather -> (products) -> results; else: none)
        all results -> Concat -> Gather(in the order of rows) -> MatMul(shares) -> out

    Returns: how many nodes were replaced.
    """
    count = 0
    for part in list(graph.parts()):
        count += part.rewrite(partial(_spread, graph, part))
    if count:
        graph.add_constant(_FLAT, [-1])
        graph.add_constant(_COLUMNS, [1])
        graph.add_constant(_ZERO, 0)
        graph.add_constant(_ONE, 1)
        graph.add_constant(_POSITION, 1)
        graph.drop_unread()
    return count


def _spread(graph: Graph, part: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    if node.op_type != "RoutedExperts":
        return None
    rows, _, *stacks = graph.expect_inputs(node, 5)
    weights = [_Stack(graph, part, name) for name in stacks]
    experts, hidden, _ = weights[0].dims
    top_k, out = attribute(node, "top_k"), node.output[0]
    name = partial(value_of, node)

    def constant(what: str, value: object) -> str:
        return graph.add_constant(name(what), value)

    every = graph.add_constant(f"lowered.experts.numbers.{experts}", np.arange(experts)[:, None])
    none = f"{_NONE}.{hidden}"
    if none not in graph.constants:
        graph.add_constant(none, np.zeros((0, hidden), np.float32))
    choice = choose(graph, node)
    nodes = choice.nodes
    used = [name(f"{expert}.used") for expert in range(experts)]
    nodes += [
        # A pair is a row and one of its experts; numbered by row, then by share.
        make_node("Reshape", [choice.chosen, _FLAT], name("pairs")),
        make_node("Equal", [every, name("pairs")], name("owned")),
        make_node("ReduceMax", [name("owned"), _COLUMNS], name("used"), keepdims=0),
        helper.make_node("Split", [name("used")], used, name=name("split"), axis=0, num_outputs=experts),
        make_node("Size", [name("pairs")], name("count")),
        make_node("Range", [_ZERO, name("count"), _ONE], name("numbers")),
        make_node("Div", [name("numbers"), constant("per_row", top_k)], name("rows")),
    ]
    results = [name(f"{expert}.results") for expert in range(experts)]
    for expert in range(experts):
        nodes.append(
            helper.make_node(
                "If",
                [used[expert]],
                [results[expert]],
                name=name(f"{expert}.if"),
                then_branch=_products_of(graph, name, rows, weights, expert),
                else_branch=_no_results(name(f"{expert}.else"), none),
            )
        )
    nodes += [
        make_node("Concat", results, name("results"), axis=0),
        # Which pair each of the results is of, and so which result each pair has.
        make_node("NonZero", [name("owned")], name("places")),
        make_node("Gather", [name("places"), _POSITION], name("order"), axis=0),
        make_node("ScatterElements", [name("order"), name("order"), name("numbers")], name("back"), axis=0),
        make_node("Gather", [name("results"), name("back")], name("by_pair"), axis=0),
        make_node("Reshape", [name("by_pair"), constant("by_row", [-1, top_k, hidden])], name("of_rows")),
        make_node("Unsqueeze", [choice.shares, _COLUMNS], name("row_shares")),
        make_node("MatMul", [name("row_shares"), name("of_rows")], name("sums")),
        make_node("Squeeze", [name("sums"), _COLUMNS], out),
    ]
    return nodes


def _products_of(
    graph: Graph, name: Callable[[str], str], rows: str, weights: Sequence[_Stack], expert: int
) -> onnx.GraphProto:
    """The branch of one expert: the results of its rows, in their order."""

    def own(what: str) -> str:
        return name(f"{expert}.{what}")

    place = graph.add_constant(f"lowered.experts.place.{expert}", expert)
    gate, up, down = (stack.of(expert, own(what)) for stack, what in zip(weights, ("gate", "up", "down"), strict=True))
    nodes = [
        make_node("Gather", [name("owned"), place], own("pairs"), axis=0),
        make_node("Compress", [name("rows"), own("pairs")], own("index"), axis=0),
        make_node("Gather", [rows, own("index")], own("x"), axis=0),
        *gate.nodes,
        make_node("MatMul", [own("x"), gate.value], own("gated")),
        make_node("Sigmoid", [own("gated")], own("slope")),
        make_node("Mul", [own("gated"), own("slope")], own("activated")),
        *up.nodes,
        make_node("MatMul", [own("x"), up.value], own("raised")),
        make_node("Mul", [own("activated"), own("raised")], own("inner")),
        *down.nodes,
        make_node("MatMul", [own("inner"), down.value], own("result")),
    ]
    tensors = [tensor for one in (gate, up, down) for tensor in one.tensors]
    return helper.make_graph(nodes, own("then"), [], [_floats(own("result"))], tensors)


def _no_results(name: str, none: str) -> onnx.GraphProto:
    return helper.make_graph([make_node("Identity", [none], name)], f"{name}.graph", [], [_floats(name)])


def _floats(name: str) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    return value


@dataclass(frozen=True)
class _Weight:
    """A weight of one expert: its value's name, and the constants and nodes that it is made of."""

    value: str
    tensors: Sequence[onnx.TensorProto]
    nodes: Sequence[onnx.NodeProto]


class _Stack:
    """The weights of all experts: a constant, or one that is dequantized, or widened."""

    def __init__(self, graph: Graph, part: Graph, value: str) -> None:
        self._maker = part.producer(value) or graph.producer(value)
        names = [value] if self._maker is None else list(self._maker.input)
        if self._maker is not None:
            makers = ("DequantizeLinear", "Cast")
            graph.expect(self._maker.op_type in makers, self._maker, " or ".join(makers), self._maker.op_type)
        self._tensors = []
        for name in names:
            tensor = part.constants.get(name) or graph.constants.get(name)
            graph.expect(
                tensor is not None and len(tensor.dims) == _STACK_AXES, f"value {name!r}", "weights of experts"
            )
            assert tensor is not None
            self._tensors.append(tensor)
        self.dims = tuple(self._tensors[0].dims)

    def of(self, expert: int, name: str) -> _Weight:
        """The weight of one expert. Args: name: prefix of new names."""
        tensors = [_part(tensor, expert, f"{name}.{place}") for place, tensor in enumerate(self._tensors)]
        names = [tensor.name for tensor in tensors]
        if self._maker is None:
            return _Weight(names[0], tensors, ())
        made = copy_of(self._maker)
        made.name, made.input[:], made.output[:] = f"{name}.made", names, [f"{name}.weight"]
        if made.op_type == "DequantizeLinear":
            _of_one_expert(made, tensors)
        return _Weight(f"{name}.weight", tensors, [made])


def _of_one_expert(dequantize: onnx.NodeProto, tensors: Sequence[onnx.TensorProto]) -> None:
    """Turn the attributes for three axes into those for two; one block of all inputs becomes a scale per output."""
    rows, size = tensors[0].dims[0], attribute(dequantize, "block_size")
    del dequantize.attribute[:]
    if size < rows:
        dequantize.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", size)])
        return
    dequantize.attribute.append(helper.make_attribute("axis", 1))
    for tensor in tensors[1:]:
        del tensor.dims[0]


def _part(stack: onnx.TensorProto, number: int, name: str) -> onnx.TensorProto:
    """One part of a stored constant, along its first axis; in the same file, or copied."""
    count, *dims = stack.dims
    part = onnx.TensorProto(name=name, data_type=stack.data_type, dims=dims)
    if stack.data_location != TensorProto.EXTERNAL:
        size = len(stack.raw_data) // count
        part.raw_data = stack.raw_data[number * size : (number + 1) * size]
        return part
    place = {entry.key: entry.value for entry in stack.external_data}
    size = int(place["length"]) // count
    place |= {"offset": str(int(place["offset"]) + number * size), "length": str(size)}
    part.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        part.external_data.add(key=key, value=value)
    return part
