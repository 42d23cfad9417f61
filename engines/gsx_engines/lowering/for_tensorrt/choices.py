"""Choices of rows without a plugin: masks over all rows, or a count from the host."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from gsx_engines.lowering.choices import is_choice
from gsx_engines.lowering.for_tensorrt.task import MAX_TOPK, Form, K, Task
from gsx_plugins.graph import Graph, make_node


def mask_choices(graph: Graph, task: Task) -> int:
    """Turn a choice that TensorRT cannot import and that has no plugin into a mask: every row runs every branch.

        x, score, bound -> ThresholdGather -> rows, index, count      becomes
        score > bound -> Unsqueeze -> mask [N, 1];  mask -> ReduceSum -> count;  rows is x

        y -> Gather(index) -> its rows                becomes      y
        z, rows -> ScatterND at index -> z with them  becomes      Where(mask, rows, z)

    Why: the body of ThresholdGather needs NonZero, which TensorRT-RTX refuses. The results are the same, but nothing is
    saved. `task.masks` and `task.forms` record the form of each choice. Returns: how many choices became masks.
    """
    same: dict[str, str] = {}  # value -> the value that it equals, now that every row is present
    kept_by: dict[str, str] = {}  # the chosen rows, also widened or rounded to 8 bits -> their mask
    masks = task.masks
    count = 0

    def masked(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        nonlocal count
        if node.input and node.input[0] in kept_by:
            if node.op_type == "MatMul":
                task.products_of_kept[node.name] = kept_by[node.input[0]]
            elif node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
                kept_by[node.output[0]] = kept_by[node.input[0]]
        if not same.keys().isdisjoint(node.input):
            node.input[:] = [same.get(name, name) for name in node.input]
        op = node.op_type
        if is_choice(node):
            form = task.forms[op] = _form_of(op, task)
            if form != "mask":
                return None
            count += 1
            x, score, bound = graph.expect_inputs(node, 3)
            rows, index, kept = node.output
            same[rows], masks[index] = x, f"{index}.column"
            kept_by[rows] = masks[index]
            return _mask(graph, op, score, bound, index, kept)
        if op in ("Reshape", "Unsqueeze") and node.input[0] in masks:
            masks[node.output[0]] = masks[node.input[0]]
            return []
        if op == "Gather" and node.input[1] in masks:
            same[node.output[0]] = node.input[0]
            return []
        if op == "ScatterND" and node.input[1] in masks:
            below, index, rows = graph.expect_inputs(node, 3)
            return [make_node("Where", [masks[index], rows, below], node.output[0])]
        return None

    graph.rewrite(masked)
    return count


def _form_of(choice: str, task: Task) -> Form:
    if task.step is not None:
        return "mask"  # the decision stays on the GPU (`predicated.py`)
    if choice in task.plugins:
        return "plugin"
    return "body" if choice == "TopKGather" and task.rows <= MAX_TOPK else "mask"


def _mask(graph: Graph, op: str, score: str, bound: str, index: str, count: str) -> list[onnx.NodeProto]:
    """Nodes for the rows that a choice keeps, [N, 1] bool, and for their number."""
    kept, flags, column = f"{index}.kept", f"{index}.flags", f"{index}.column"
    last = graph.add_constant("lowered.flat", [-1])
    if op == "ThresholdGather":
        nodes = [make_node("Greater", [score, bound], kept)]
    else:
        nodes = _best(graph, score, bound, kept)
    return [
        *nodes,
        make_node("Unsqueeze", [kept, last], column),
        make_node("Cast", [kept], flags, to=TensorProto.INT64),
        make_node("ReduceSum", [flags], count, keepdims=0),
    ]


def _best(graph: Graph, score: str, k: str, kept: str) -> list[onnx.NodeProto]:
    """The k best scores as a mask: those with fewer than k better ones. N x N comparisons.

    TensorRT's TopK needs k on the host and at most 3,840; here it is a value of the graph. Ties and NaN are
    TopKGather's: the earlier row wins, and NaN counts as the lowest finite score.
    """
    name = f"{kept}."
    lowest = graph.add_constant("lowered.lowest", np.float32(np.finfo(np.float32).min))
    zero, one = graph.add_constant("lowered.zero", 0), graph.add_constant("lowered.one", 1)
    row, column = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.axis_1", [1])

    def node(op: str, inputs: list[str], out: str, **attributes: int) -> onnx.NodeProto:
        return make_node(op, inputs, name + out, **attributes)

    nodes = [
        node("IsNaN", [score], "nan"),
        node("Where", [name + "nan", lowest, score], "ranked"),
        node("Shape", [score], "tokens"),
        node("Squeeze", [name + "tokens"], "token_count"),
        node("Range", [zero, name + "token_count", one], "places"),
        # rows: the token itself; columns: the others
        node("Unsqueeze", [name + "ranked", column], "own"),
        node("Unsqueeze", [name + "ranked", row], "other"),
        node("Unsqueeze", [name + "places", column], "own_place"),
        node("Unsqueeze", [name + "places", row], "other_place"),
        node("Greater", [name + "other", name + "own"], "higher"),
        node("Equal", [name + "other", name + "own"], "equal"),
        node("Less", [name + "other_place", name + "own_place"], "earlier"),
        node("And", [name + "equal", name + "earlier"], "wins_tie"),
        node("Or", [name + "higher", name + "wins_tie"], "better"),
        node("Cast", [name + "better"], "better_flags", to=TensorProto.INT64),
        node("ReduceSum", [name + "better_flags", column], "better_count", keepdims=0),
    ]
    return [*nodes, make_node("Less", [name + "better_count", k], kept)]


def add_rows(graph: Graph, task: Task) -> int:
    """If the choice became a mask, add rows where the mask is true.

        residual, rows, gate, index -> GatedScatterAdd -> out      becomes
        gate x rows -> Add(residual) -> Where(mask, that, residual) -> out

    Elsewhere the op stays, for its plugin or its body. Returns: how many became `Where`.
    """

    def added(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "GatedScatterAdd":
            return None
        residual, rows, gate, index = graph.expect_inputs(node, 4)
        mask = task.masks.get(index)
        task.forms[node.op_type] = "mask" if mask else "plugin" if node.op_type in task.plugins else "body"
        if mask is None:
            return None
        out = node.output[0]
        return [
            make_node("Mul", [gate, rows], f"{out}.gated"),
            make_node("Add", [residual, f"{out}.gated"], f"{out}.added"),
            make_node("Where", [mask, f"{out}.added", residual], out),
        ]

    return graph.rewrite(added)


def count_on_host(graph: Graph, task: Task) -> int:
    """Take the number of rows that rank selection keeps from the caller, if TopKGather's body is imported.

        budget, tokens -> (arithmetic) -> k      becomes      the input k [1]

    Why: TensorRT's TopK reads k before the call runs.
    """
    if task.forms.get("TopKGather") != "body":
        return 0
    count = graph.rewrite(lambda node: [] if K in node.output else None)
    graph.keep_inputs(lambda name: name != "budget")
    graph.proto.input.append(helper.make_tensor_value_info(K, TensorProto.INT64, [1]))
    return count
