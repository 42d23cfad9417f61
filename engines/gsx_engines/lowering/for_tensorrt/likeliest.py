"""The likeliest tokens as outputs of a step, so that not all logits have to leave the GPU."""

from __future__ import annotations

from onnx import TensorProto, helper

from gsx_engines.lowering.for_tensorrt.task import LIKELY_IDS, LIKELY_LOGITS, LIKELY_TOTAL, Task
from gsx_plugins.graph import Graph, make_node

# Tokens that are given: all that top-k of 100 and a few equal ones need, in 1.5 KB. (TensorRT takes up to `MAX_TOPK`.)
MOST_LIKELY = 128


def offer_likeliest(graph: Graph, task: Task) -> int:
    """Add the outputs `likely_ids`, `likely_logits` [B, S, C] and `likely_total` [B, S] to a step.

        logits      is followed by      TopK -> likely_logits, likely_ids
        logits - the largest -> Exp -> ReduceSum -> likely_total

    Why: logits are half a megabyte for each token of a large vocabulary, and a token is picked from a few of them. The
    sum tells whether a logit is no number, and how sure a draft is.
    """
    if task.step is None:
        return 0
    batch, tokens = task.step
    count = min(MOST_LIKELY, task.shape.vocab_size)
    first, last = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.last", [-1])
    one, many = graph.add_constant("lowered.axis_1", [1]), graph.add_constant("lowered.likely_count", [count])
    largest = "lowered.largest_logit"
    graph.append(
        helper.make_node("TopK", ["logits", many], [LIKELY_LOGITS, LIKELY_IDS], name=LIKELY_IDS, axis=-1),
        make_node("Slice", [LIKELY_LOGITS, first, one, last], largest),
        make_node("Sub", ["logits", largest], "lowered.below_largest"),
        make_node("Exp", ["lowered.below_largest"], "lowered.unnormalized"),
        make_node("ReduceSum", ["lowered.unnormalized", last], LIKELY_TOTAL, keepdims=0),
    )
    for name, kind, shape in (
        (LIKELY_IDS, TensorProto.INT64, [batch, tokens, count]),
        (LIKELY_LOGITS, TensorProto.FLOAT, [batch, tokens, count]),
        (LIKELY_TOTAL, TensorProto.FLOAT, [batch, tokens]),
    ):
        graph.proto.output.append(helper.make_tensor_value_info(name, kind, shape))
    return 1
