"""Final norm and head as a model of their own."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.bundle import tensor_names
from gsx_engines.lowering.for_onnxruntime.task import STATE, Task
from gsx_plugins.graph import Graph, make_node


def give_state(graph: Graph, task: Task) -> int:
    """In the layers' model, return the state that the head reads instead of the logits.

        layers.L.output -> Reshape [B, S, H] -> (norm, head) -> logits      becomes
        layers.L.output -> Reshape [B, S, H] -> Identity -> state

    `exit_hidden` is removed too, since it is the same state. Why: in generation the head runs only on the last column,
    and the two halves of a split decoder share one head, so that its weights are in memory once.
    """
    shaped = _shaped_state(graph, task)
    kept = [value for value in graph.proto.output if value.name not in ("logits", "exit_hidden")]
    leaving = helper.make_tensor_value_info(STATE, TensorProto.FLOAT, ["batch", "sequence", None])
    graph.append(make_node("Identity", [shaped], STATE))
    graph.set_outputs([*kept, leaving])
    return 1


def take_state(graph: Graph, task: Task) -> int:
    """In the head's model, the state is an input, [1, any, H], and the logits are the only output."""
    logits = graph.expect_output("logits")
    state = helper.make_tensor_value_info(STATE, TensorProto.FLOAT, [1, "columns", task.shape.hidden_size])
    logits.type.tensor_type.shape.dim[1].dim_param = "columns"
    graph.reroute({_shaped_state(graph, task): STATE})
    graph.keep_inputs(lambda name: False)
    graph.proto.input.append(state)
    graph.set_outputs([logits])
    graph.drop_unread()
    return 1


def scatter_logits(graph: Graph, task: Task) -> int:
    """In the head of a draft that chooses among N tokens, put their logits into their places.

        logits [1, any, N] -> Pad -> Gather(places [V]) -> [1, any, V]      becomes
        minus infinity [1, any, V] -> ScatterElements(ids [1, any, N], logits)

    Why: ONNX Runtime gathers single numbers one by one, V of them; of N it scatters one row in an eighth of the time
    (measured: 260 and 35 us of 8,192 of 49,152 tokens). Returns: 1 if there is such a head.
    """
    if tensor_names.DRAFT_PLACES not in graph.constants:
        return 0
    gather = graph.expect_producer(tensor_names.LOGITS, "Gather")
    few = graph.expect_producer(gather.input[0], "Pad").input[0]
    places = numpy_helper.to_array(graph.constants[tensor_names.DRAFT_PLACES])
    assert task.manifest.draft is not None
    assert task.manifest.draft.vocabulary is not None
    ids = np.argsort(places, kind="stable")[: task.manifest.draft.vocabulary.tokens]
    name = "lowered.draft."
    least = helper.make_tensor("", TensorProto.FLOAT, [1], [-np.inf])
    graph.replace(
        gather,
        make_node("Shape", [few], f"{name}sizes"),
        make_node("Expand", [graph.add_constant(f"{name}ids", ids), f"{name}sizes"], f"{name}all_ids"),
        make_node("Shape", [few], f"{name}rows", end=-1),
        make_node("Concat", [f"{name}rows", graph.add_constant(f"{name}size", [len(places)])], f"{name}shape", axis=0),
        make_node("ConstantOfShape", [f"{name}shape"], f"{name}never", value=least),
        make_node("ScatterElements", [f"{name}never", f"{name}all_ids", few], gather.output[0], axis=-1),
    )
    graph.drop_unread()
    return 1


def _shaped_state(graph: Graph, task: Task) -> str:
    """The last state as [B, S, H]: the reshaped value that some node reads (the exit's is only an output)."""
    for node in graph.users(task.last_output):
        if node.op_type == "Reshape" and node.input[0] == task.last_output and graph.users(node.output[0]):
            return node.output[0]
    raise graph.error(f"value {task.last_output!r}", "a Reshape that shapes it for the head", "none")
