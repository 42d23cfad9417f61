"""Products of a step that read the decision on the GPU: what a token skips is not read.

In a step every branch is masked (`choices.py`): all shapes are fixed, nothing waits, and one CUDA graph holds a call.
So that masks save something, the products of a masked branch become plugins that first compare score and bound, and
return without having read weights or rows where no row is kept (`plugins/gsx_plugins/skip_branch`). Attention has a
plugin of its own (`step_attention.py`). What is left stays masked, as norms do. K and V of a skipped token are
computed where the K/V policy wants them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from gsx_engines.lowering.for_tensorrt.step_weights import has_step_plugins, step_product, weights_of
from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph


@dataclass(frozen=True)
class Decision:
    """What a plugin compares: a row is kept if its score exceeds the bound."""

    score: str
    bound: str


def predicate_branches(graph: Graph, task: Task) -> int:
    """Let plugins do the products of masked branches.

        Where(score > bound, residual + gate x (h W), residual)      becomes      SkipLinearAdd(residual, h, gate, W)
        silu(x G) x (x U)      becomes      SkipGateUp(x, G, U)      if only the above reads it
        x W      becomes      SkipLinear(x, W), 0 in skipped rows      of all other products of kept rows

    Only in a step of few rows, and where the library has the plugins. Weights may be codes of 8 bits
    (`step_weights.py`); rows that a graph rounds to 8 bits before a product (x -> QuantizeLinear -> DequantizeLinear)
    stay rounded. Products with 4-bit weights, biases or norms behind them stay as they are.

    Returns: how many branches no longer read the weights of their last product for nothing.
    """
    if not has_step_plugins(task):
        return 0
    ends = {node.output[0]: made for node in graph.nodes if (made := _end_of_branch(graph, task, node)) is not None}
    hidden = {_before_rounding(graph, made.input[1]): _read_by(made) for made in ends.values()}
    gates = {name: made for name, decision in hidden.items() if (made := _gate_up(graph, task, name, decision))}
    fused = {product for made in gates.values() for product in _products_of(graph, made.output[0])}

    def predicated(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        out = node.output[0]
        if out in ends:
            return [ends[out]]
        if out in gates:
            return [gates[out]]
        kept = task.products_of_kept.get(node.name)
        decision = decision_of(graph, kept) if kept is not None and out not in fused else None
        weights = weights_of(graph, task, node)
        if decision is None or weights is None:
            return None
        return [step_product("SkipLinear", [node.input[0], decision.score, decision.bound], [weights], out)]

    graph.rewrite(predicated)
    graph.drop_unread()
    if ends:
        task.forms.update({op: "predicated" for op in ("ThresholdGather", "TopKGather") if op in task.forms})
        task.forms["GatedScatterAdd"] = "predicated"
    return len(ends)


def decision_of(graph: Graph, column: str) -> Decision | None:
    """What a mask [N, 1] compares; None if it is not a comparison of scores with a bound."""
    unsqueezed = graph.producer(column)
    compared = graph.producer(unsqueezed.input[0]) if unsqueezed is not None else None
    if compared is None or compared.op_type != "Greater":
        return None
    return Decision(*compared.input)


def _read_by(made: onnx.NodeProto) -> Decision:
    """The decision that a SkipLinearAdd reads."""
    return Decision(made.input[3], made.input[4])


def _end_of_branch(graph: Graph, task: Task, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The plugin for the end of a masked branch, or None."""
    if node.op_type != "Where" or node.input[0] not in task.masks.values():
        return None
    column, changed, residual = node.input
    decision = decision_of(graph, column)
    added = graph.producer(changed)
    gated = graph.producer(added.input[1]) if added is not None and added.op_type == "Add" else None
    if decision is None or added is None or gated is None or gated.op_type != "Mul" or added.input[0] != residual:
        return None
    gate, rows = gated.input
    product = graph.producer(rows)
    weights = weights_of(graph, task, product) if product is not None else None
    if product is None or weights is None:
        return None
    inputs = [residual, product.input[0], gate, decision.score, decision.bound]
    return step_product("SkipLinearAdd", inputs, [weights], node.output[0])


def _before_rounding(graph: Graph, name: str) -> str:
    """What was rounded to 8 bits, for a value that such a pair gives; else the value itself."""
    rounded = graph.producer(name)
    quantized = (
        graph.producer(rounded.input[0]) if rounded is not None and rounded.op_type == "DequantizeLinear" else None
    )
    return quantized.input[0] if quantized is not None and quantized.op_type == "QuantizeLinear" else name


def _gate_up(graph: Graph, task: Task, name: str, decision: Decision) -> onnx.NodeProto | None:
    """The plugin for what a down projection reads, silu(x G) x (x U), or None."""
    multiplied = graph.producer(name)
    if multiplied is None or multiplied.op_type != "Mul" or len(graph.users(name)) != 1:
        return None
    silu, up = (graph.producer(value) for value in multiplied.input)
    if silu is None or up is None or silu.op_type != "Mul":
        return None
    gate, sigmoid = (graph.producer(value) for value in silu.input)
    if gate is None or sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.input[0] != silu.input[0]:
        return None
    both = [weights for product in (gate, up) if (weights := weights_of(graph, task, product)) is not None]
    if len(both) != 2 or both[0].form != both[1].form or gate.input[0] != up.input[0]:
        return None
    return step_product("SkipGateUp", [gate.input[0], decision.score, decision.bound], both, name)


def _products_of(graph: Graph, name: str) -> list[str]:
    """The two products behind what `_gate_up` found."""
    multiplied = graph.expect_producer(name, "Mul")
    return [graph.expect_producer(multiplied.input[0], "Mul").input[0], multiplied.input[1]]
