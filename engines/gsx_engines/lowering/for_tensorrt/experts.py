"""Routed experts in standard ops that TensorRT imports: every row through all experts that the call may use."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import helper

from gsx_engines.lowering.experts import Choice, choose, value_of
from gsx_engines.lowering.for_tensorrt.task import RUN, Task
from gsx_plugins.graph import Graph, attribute, make_node

_FIRST, _SECOND, _LAST = "lowered.first", "lowered.axis_1", "lowered.last"


def run_experts(graph: Graph, task: Task) -> int:
    """Routed experts as batched products, in which the weight of an expert that a row did not choose is 0.

        rows, logits, gate, up, down -> RoutedExperts -> out      becomes
        logits -> Softmax -> TopK -> shares by expert [K, E] -> the m = min(E, tokens x top_k) largest sums -> picked
        rows [1, K, H], Gather(gate, picked), .. -> MatMul -> inner [m, K, F] x shares -> [K, m x F] -> MatMul -> out

    Why: the rows of an expert are as many as the data says, and the body's Loop over them is refused. In a step of
    decoding m is the number of experts that it runs through, so that only their weights are read; in prefill it is all
    of them. For a single row see `_of_one_token`. Codes are not picked from: TensorRT takes them only where they are
    dequantized. Returns: how many.
    """

    def spelled(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "RoutedExperts":
            return None
        task.forms[node.op_type] = "all"
        return _spelled(graph, task, node)

    return graph.rewrite(spelled)


def _spelled(graph: Graph, task: Task, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    rows, _, *stacks = graph.expect_inputs(node, 5)
    top_k, out = attribute(node, "top_k"), node.output[0]
    makers = [graph.producer(stack) for stack in stacks]
    experts, hidden, width = _dims(graph, stacks[0] if makers[0] is None else makers[0].input[0])
    codes = [maker for maker in makers if maker is not None and maker.op_type == "DequantizeLinear"]
    graph.add_constant(_FIRST, [0])
    graph.add_constant(_SECOND, [1])
    graph.add_constant(_LAST, [-1])
    name = partial(value_of, node)

    def constant(what: str, value: object) -> str:
        return graph.add_constant(name(what), value)

    choice = choose(graph, node)
    nodes = choice.nodes
    if not codes and _is_one_row(graph, task):
        return [*nodes, *_of_one_token(graph, task, node, choice)]
    numbers = graph.add_constant(f"lowered.experts.{experts}", np.arange(experts))
    zero = graph.add_constant("lowered.experts.zero", np.float32(0))
    nodes += [
        make_node("Unsqueeze", [choice.chosen, _LAST], name("chosen_column")),
        make_node("Equal", [name("chosen_column"), numbers], name("is_chosen")),
        make_node("Unsqueeze", [choice.shares, _LAST], name("share_column")),
        make_node("Where", [name("is_chosen"), name("share_column"), zero], name("spread")),
        make_node("ReduceSum", [name("spread"), _SECOND], name("by_expert"), keepdims=0),  # [K, E]
    ]
    by_expert, weights = name("by_expert"), list(stacks)
    columns = constant("columns", [experts * width])
    if not codes:
        limits = constant("limits", [experts]), constant("per_token", [top_k])
        nodes += [
            make_node("Shape", ["input_ids"], name("call")),
            make_node("ReduceProd", [name("call")], name("tokens"), keepdims=1),
            make_node("Mul", [name("tokens"), limits[1]], name("most")),
            make_node("Min", [name("most"), limits[0]], name("count")),
            make_node("ReduceSum", [by_expert, _FIRST], name("uses"), keepdims=0),
            helper.make_node(
                "TopK", [name("uses"), name("count")], [name("largest"), name("picked")], name=name("largest")
            ),
            make_node("Gather", [by_expert, name("picked")], name("by_picked"), axis=1),
        ]
        by_expert, weights = name("by_picked"), [name(f"weight_{number}") for number in range(3)]
        nodes += [
            make_node("Gather", [stack, name("picked")], weight, axis=0)
            for stack, weight in zip(stacks, weights, strict=True)
        ]
        nodes.append(make_node("Reshape", [weights[2], constant("down_shape", [-1, hidden])], name("down")))
        nodes.append(make_node("Mul", [name("count"), constant("width", [width])], name("picked_columns")))
        weights[2], columns = name("down"), name("picked_columns")
    else:
        graph.expect(len(codes) == len(stacks), node, "codes in all its weights, or in none", f"{len(codes)}")
        _join(graph, codes[2], experts)
    gate, up, down = weights
    return [
        *nodes,
        make_node("Unsqueeze", [rows, _FIRST], name("every_row")),
        make_node("MatMul", [name("every_row"), gate], name("gated")),
        make_node("Sigmoid", [name("gated")], name("slope")),
        make_node("Mul", [name("gated"), name("slope")], name("activated")),
        make_node("MatMul", [name("every_row"), up], name("raised")),
        make_node("Mul", [name("activated"), name("raised")], name("inner")),
        make_node("Transpose", [by_expert], name("of_expert"), perm=[1, 0]),
        make_node("Unsqueeze", [name("of_expert"), _LAST], name("share_rows")),
        make_node("Cast", [name("share_rows")], name("share_rows_narrow"), to=task.float_type),
        make_node("Mul", [name("inner"), name("share_rows_narrow")], name("weighted")),
        make_node("Transpose", [name("weighted")], name("rows_first"), perm=[1, 0, 2]),
        make_node("Shape", [rows], name("row_count"), end=1),
        make_node("Concat", [name("row_count"), columns], name("flat_shape"), axis=0),
        make_node("Reshape", [name("rows_first"), name("flat_shape")], name("flat"), allowzero=1),
        make_node("MatMul", [name("flat"), down], out),
    ]


def _dims(graph: Graph, name: str) -> list[int]:
    tensor = graph.constants.get(name)
    graph.expect(tensor is not None and len(tensor.dims) == 3, f"value {name!r}", "the weights of experts")
    assert tensor is not None
    return list(tensor.dims)


def _join(graph: Graph, dequantize: onnx.NodeProto, experts: int) -> None:
    """Let a stack be dequantized as one matrix, all experts' rows one below the other."""
    for name in dequantize.input:
        tensor = graph.constants[name]
        if len(tensor.dims) == 3:
            tensor.dims[:] = [experts * tensor.dims[1], tensor.dims[2]]
    for one in dequantize.attribute:
        if one.name == "axis":
            one.i = 0


def _is_one_row(graph: Graph, task: Task) -> bool:
    """Whether every call has one row: a step of one token, which no branch is called without."""
    some = {task.forms.get(op) for op in ("ThresholdGather", "TopKGather")} & {"plugin", "body", "rows"}
    return task.step == (1, 1) and not some and not any(value.name.startswith(RUN) for value in graph.proto.input)


def _of_one_token(graph: Graph, task: Task, node: onnx.NodeProto, choice: Choice) -> list[onnx.NodeProto]:
    """The experts of a single row: those that it chose, by products and their sums, in float32.

    Why: a matrix product of picked weights is preceded by a copy of them; a sum reads them where they are (plans of
    TensorRT-RTX 1.7.1).
    """
    rows, _, *stacks = graph.expect_inputs(node, 5)
    name = partial(value_of, node)
    axes = [graph.add_constant(f"lowered.axis_{axis}", [axis]) for axis in range(3)]
    flat = graph.add_constant(_LAST, [-1])
    nodes = [
        make_node("Reshape", [choice.chosen, flat], name("picked")),
        make_node("Reshape", [choice.shares, flat], name("picked_shares")),
        make_node("Unsqueeze", [name("picked_shares"), axes[1]], name("share_rows")),  # [k, 1]
        make_node("Cast", [rows], name("row"), to=onnx.TensorProto.FLOAT),
        make_node("Unsqueeze", [name("row"), axes[2]], name("column")),  # [1, H, 1]
    ]

    def product(stack: str, left: str, over: str, called: str) -> list[onnx.NodeProto]:
        return [
            make_node("Gather", [stack, name("picked")], name(f"{called}_stored"), axis=0),
            make_node("Cast", [name(f"{called}_stored")], name(f"{called}_weight"), to=onnx.TensorProto.FLOAT),
            make_node("Mul", [left, name(f"{called}_weight")], name(f"{called}_products")),
            make_node("ReduceSum", [name(f"{called}_products"), over], name(called), keepdims=0),
        ]

    return [
        *nodes,
        *product(stacks[0], name("column"), axes[1], "gated"),  # [k, F]
        *product(stacks[1], name("column"), axes[1], "raised"),
        make_node("Sigmoid", [name("gated")], name("slope")),
        make_node("Mul", [name("gated"), name("slope")], name("activated")),
        make_node("Mul", [name("activated"), name("raised")], name("inner")),
        make_node("Mul", [name("inner"), name("share_rows")], name("weighted")),
        make_node("Unsqueeze", [name("weighted"), axes[2]], name("weighted_column")),  # [k, F, 1]
        *product(stacks[2], name("weighted_column"), graph.add_constant("lowered.axes_0_1", [0, 1]), "sums"),
        make_node("Unsqueeze", [name("sums"), axes[0]], name("sum_row")),
        make_node("Cast", [name("sum_row")], node.output[0], to=task.float_type),
    ]
