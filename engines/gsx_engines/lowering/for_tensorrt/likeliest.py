"""The likeliest tokens as outputs of a step, so that not all logits have to leave the GPU."""

from __future__ import annotations

from onnx import TensorProto, helper

from gsx_engines.lowering.for_tensorrt.task import LIKELY_IDS, LIKELY_LOGITS, LIKELY_TOTAL, Task
from gsx_plugins.graph import Graph, make_node

# Enough for top-k of 100 with a few equal logits, in 1.5 KB. (TensorRT allows up to `MAX_TOPK`.)
MOST_LIKELY = 128


def offer_likeliest(graph: Graph, task: Task) -> int:
    """Add the outputs `likely_ids`, `likely_logits` [B, S, C] and `likely_total` [B, S] to a step.

        logits -> TopK -> likely_logits, likely_ids
        logits - the largest -> Exp -> ReduceSum -> likely_total

    Why: with a large vocabulary the logits of one token take half a megabyte, and the token is picked from a few of
    them. The sum tells whether a logit is NaN or infinite, and how confident a draft is.

    C is `MOST_LIKELY`, or the whole vocabulary if that is smaller. Returns: 1 in a step, else 0.
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
