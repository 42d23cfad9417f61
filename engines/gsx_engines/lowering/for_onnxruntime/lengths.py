"""The positions of a call's tokens in the cache, and what each may see, from the input `total_length`."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.lowering.for_onnxruntime.task import FIRST, LAST, TOTAL, TOTAL_LENGTH, WRITE_AT, Task
from gsx_plugins.graph import Graph, make_node


def count_from_total_length(graph: Graph, task: Task) -> int:
    """Take the cache's lengths from `total_length [B]`, instead of from the input `attention_mask`.

        attention_mask -> Slice(the call's tokens)      becomes      input_ids -> Shape -> ConstantOfShape(1)

    and the lengths that the kernels need are computed too. Why: nothing is padded, so the mask only says how long the
    cache is, and computing it costs time in every step.
    """
    graph.keep_inputs(lambda name: name != "attention_mask")
    graph.proto.input.append(helper.make_tensor_value_info(TOTAL_LENGTH, TensorProto.INT64, ["batch"]))
    int_one = graph.add_constant("lowered.one.int32", np.int32(1))
    zero, one = graph.add_constant("lowered.zero", 0), graph.add_constant("lowered.one", 1)
    beside = graph.add_constant("lowered.beside_rows", [1, 3])
    graph.add_constant(FIRST, [0])

    def whole(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "Slice" or node.input[0] != "attention_mask":
            return None
        node.op_type, node.input[:] = "Identity", ["attention_mask"]  # the mask now has only the new tokens' part
        return [node]

    count = graph.rewrite(whole)
    ones = numpy_helper.from_array(np.array([1], np.int64))
    graph.prepend(
        # The new tokens' part of the mask: nothing else of it is read.
        make_node("Shape", ["input_ids"], "lowered.new_shape"),
        make_node("ConstantOfShape", ["lowered.new_shape"], "attention_mask", value=ones),
        make_node("Shape", ["input_ids"], "lowered.batch", start=0, end=1),
        make_node("ReduceMax", [TOTAL_LENGTH], "lowered.longest", keepdims=0),
        make_node("Cast", ["lowered.longest"], TOTAL, to=TensorProto.INT32),
        make_node("Cast", [TOTAL_LENGTH], "lowered.lengths", to=TensorProto.INT32),
        make_node("Sub", ["lowered.lengths", int_one], LAST),
        make_node("Shape", ["input_ids"], "lowered.new_length", start=1, end=2),
        make_node("Sub", [TOTAL_LENGTH, "lowered.new_length"], WRITE_AT),
        make_node("Range", [zero, "lowered.longest", one], "lowered.columns"),
        make_node("Unsqueeze", ["position_ids", beside], "lowered.places"),
    )
    return count


def mask_by_place(graph: Graph, task: Task) -> int:
    """Compute a window's mask only from the tokens' positions.

        (padding, causality, window) -> mask.n      becomes
        places, columns -> LessOrEqual (-> And <- Greater <- places - window) -> mask.n [B, 1, S, T] bool

    Why: without padding a row sees its own column and those before it, as far as the window reaches.
    """
    windows = dict.fromkeys(task.shape.windows)
    masks = {f"mask.{number}": window for number, window in enumerate(windows)}
    count = graph.rewrite(lambda node: [] if node.output[0] in masks else None)
    nodes = [node for mask, window in masks.items() for node in _mask_nodes(graph, mask, window)]
    graph.insert_after(graph.expect_producer("lowered.places"), *nodes)
    return count


def _mask_nodes(graph: Graph, mask: str, window: int | None) -> list[onnx.NodeProto]:
    if window is None:
        return [make_node("LessOrEqual", ["lowered.columns", "lowered.places"], mask)]
    before, after, outside, size = (f"lowered.{mask}.{name}" for name in ("before", "after", "outside", "window"))
    graph.add_constant(size, window)
    return [
        make_node("LessOrEqual", ["lowered.columns", "lowered.places"], before),
        make_node("Sub", ["lowered.places", size], outside),
        make_node("Greater", ["lowered.columns", outside], after),
        make_node("And", [before, after], mask),
    ]
