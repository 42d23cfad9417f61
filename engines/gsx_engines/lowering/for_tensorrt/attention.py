"""Attention written out for TensorRT's `Attention` op, which has one output and takes an explicit mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, attribute, make_node, number

# Score of a column that a row may not see: far below any capped score, and finite in half precision.
_UNSEEN = -30000.0


def attend_kept_rows(graph: Graph, task: Task) -> int:
    """Attention of all rows, each at its position, of which the kept ones are read.

        query, index, key, value, mask -> GatheredAttention -> out      becomes
        query -> ScatterND at index -> [B, S, ..] -> Attention -> Reshape -> Gather(index) -> out

    If the choice became a mask, all rows are present already, so neither ScatterND nor Gather is needed. Why: the kept
    rows of several sequences do not form a rectangle [B, K], which Attention needs; nobody promises that it takes a
    query without rows, which a skipped branch of one token would be; and one mask for all layers is prepared once,
    where masks of kept rows cost 7 kernels and a copy to the GPU in each layer (plans of TensorRT-RTX 1.7.1).
    Where the host decided, the kept rows are the first ones: `_attend_first_rows`.
    """

    def attend(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "GatheredAttention":
            return None
        query, index, key, value, mask = graph.expect_inputs(node, 5)
        name, out = f"{node.name}.", node.output[0]
        task.forms[node.op_type] = "all"
        if index in task.whole_rows:
            return _attend_first_rows(graph, task, node, task.whole_rows[index])
        flat = graph.add_constant("lowered.flat_rows", [-1, task.width])
        width = graph.add_constant("lowered.width", [task.width])
        every_row = index in task.masks
        nodes = [] if every_row else _at_their_positions(graph, task, query, index, name)
        nodes += [
            make_node("Shape", ["input_ids"], f"{name}outer"),
            make_node("Concat", [f"{name}outer", width], f"{name}shape", axis=0),
            make_node("Reshape", [query if every_row else f"{name}full", f"{name}shape"], f"{name}by_sequence"),
            *attention_nodes(graph, task, node, [f"{name}by_sequence", key, value, mask], f"{name}attended", name),
        ]
        if every_row:
            return [*nodes, make_node("Reshape", [f"{name}attended", flat], out)]
        return [
            *nodes,
            make_node("Reshape", [f"{name}attended", flat], f"{name}every"),
            make_node("Gather", [f"{name}every", index], out, axis=0),
        ]

    return graph.rewrite(attend)


def _at_their_positions(graph: Graph, task: Task, rows: str, index: str, name: str) -> list[onnx.NodeProto]:
    """Rows [K, width] at their positions among all tokens, [N, width], with zeros elsewhere: `{name}full`."""
    zeros = np.zeros(1, helper.tensor_dtype_to_np_dtype(task.float_type))
    empty, last = graph.add_constant("lowered.empty", zeros), graph.add_constant("lowered.last", [-1])
    width = graph.add_constant("lowered.width", [task.width])
    return [
        make_node("Shape", ["input_ids"], f"{name}call"),
        make_node("ReduceProd", [f"{name}call"], f"{name}tokens", keepdims=1),
        make_node("Concat", [f"{name}tokens", width], f"{name}flat_shape", axis=0),
        make_node("Expand", [empty, f"{name}flat_shape"], f"{name}empty"),
        make_node("Unsqueeze", [index, last], f"{name}place"),
        make_node("ScatterND", [f"{name}empty", f"{name}place", rows], f"{name}full"),
    ]


def _attend_first_rows(graph: Graph, task: Task, node: onnx.NodeProto, n: str) -> list[onnx.NodeProto]:
    """Attention of all rows, of which the first n are read.

    query -> Concat(query, zeros) -> [B, S, ..] -> Attention -> (as rows) -> [:n] -> out
    """
    query, _, key, value, mask = graph.expect_inputs(node, 5)
    out, name = node.output[0], f"{node.name}."
    zero = graph.add_constant("lowered.empty", np.zeros(1, helper.tensor_dtype_to_np_dtype(task.float_type)))
    width = graph.add_constant("lowered.width", [task.width])
    flat = graph.add_constant("lowered.flat_rows", [-1, task.width])
    first, axis = graph.add_constant("lowered.first", [0]), graph.add_constant("lowered.only_axis_0", [0])
    return [
        make_node("Shape", ["input_ids"], f"{name}outer"),
        make_node("ReduceProd", [f"{name}outer"], f"{name}tokens", keepdims=1),
        make_node("Sub", [f"{name}tokens", n], f"{name}left"),
        make_node("Concat", [f"{name}left", width], f"{name}left_shape", axis=0),
        make_node("Expand", [zero, f"{name}left_shape"], f"{name}zeros"),
        make_node("Concat", [query, f"{name}zeros"], f"{name}full", axis=0),
        make_node("Concat", [f"{name}outer", width], f"{name}shape", axis=0),
        make_node("Reshape", [f"{name}full", f"{name}shape"], f"{name}by_sequence"),
        *attention_nodes(graph, task, node, [f"{name}by_sequence", key, value, mask], f"{name}every", name),
        make_node("Reshape", [f"{name}every", flat], f"{name}flat"),
        make_node("Slice", [f"{name}flat", first, n, axis], out),
    ]


def attend(graph: Graph, task: Task) -> int:
    """Attention of all rows.

    query, key, value, mask -> FullAttention -> out      becomes      (heads apart) -> Attention -> (together) -> out
    """

    def spelled(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "FullAttention":
            return None
        task.forms[node.op_type] = "all"
        return attention_nodes(graph, task, node, graph.expect_inputs(node, 4), node.output[0], f"{node.name}.")

    return graph.rewrite(spelled)


def attention_nodes(
    graph: Graph, task: Task, replaced: onnx.NodeProto, inputs: Sequence[str], out: str, name: str
) -> list[onnx.NodeProto]:
    """query [B, S, heads x D], key and value [B, kv heads, window, D], mask [B, 1, S, window] -> as query."""
    if softcap := number(replaced, "softcap"):
        return _capped(graph, task, softcap, number(replaced, "scale"), inputs, out, name)
    query, key, value, mask = inputs
    if task.step is not None and task.step[1] > 1:
        return _tokens_as_heads(graph, task, replaced, inputs, out, name)
    apart, together = _shapes(graph, task.shape.num_heads, task.shape.head_dim)
    # Without a fused kernel (float32, some counts of kept rows) the build fails, unless TensorRT may decompose the op.
    attributes: dict[str, float] = {"TRT_decomposable": 1}
    if scale := number(replaced, "scale"):
        attributes["scale"] = scale
    return [
        make_node("Reshape", [query, apart], f"{name}apart"),
        make_node("Transpose", [f"{name}apart"], f"{name}heads", perm=[0, 2, 1, 3]),
        make_node("Attention", [f"{name}heads", key, value, mask], f"{name}attention", **attributes),
        make_node("Transpose", [f"{name}attention"], f"{name}tokens_first", perm=[0, 2, 1, 3]),
        make_node("Reshape", [f"{name}tokens_first", together], out),
    ]


def _tokens_as_heads(
    graph: Graph, task: Task, replaced: onnx.NodeProto, inputs: Sequence[str], out: str, name: str
) -> list[onnx.NodeProto]:
    """The same in a step of several tokens: each token of a head as a head of its own, with one token.

        query [B, S, heads x D], mask [B, 1, S, T] -> [B, heads x S, 1, D], [B, heads x S, 1, T] -> Attention

    A head and its tokens are neighbours, so that they share the head of K and V that the head had. Why: for one token
    TensorRT-RTX 1.7.1 reads K and V in place; for several it first copies both, repeated for all heads, in every layer.
    """
    assert task.step is not None
    query, key, value, mask = inputs
    heads, width = task.shape.num_heads, task.shape.head_dim
    batch, tokens = task.step
    size = [batch, heads * tokens, 1]
    attributes: dict[str, float] = {"TRT_decomposable": 1}
    if scale := number(replaced, "scale"):
        attributes["scale"] = scale

    def shape(called: str, value: list[int]) -> str:
        return graph.add_constant(f"lowered.step_{called}", value)

    by_head = f"{mask}.by_head"
    masks = []
    if not any(node.output[0] == by_head for node in task.made):
        masks = [
            make_node("Expand", [mask, shape("every_head", [batch, heads, tokens, task.capacity])], f"{by_head}.each"),
            make_node("Reshape", [f"{by_head}.each", shape("masks", [*size, task.capacity])], by_head),
        ]
        task.made.extend(masks)
    return [
        *masks,
        make_node("Reshape", [query, shape("apart", [batch, tokens, heads, width])], f"{name}apart"),
        make_node("Transpose", [f"{name}apart"], f"{name}heads", perm=[0, 2, 1, 3]),
        make_node("Reshape", [f"{name}heads", shape("queries", [*size, width])], f"{name}queries"),
        make_node("Attention", [f"{name}queries", key, value, by_head], f"{name}attention", **attributes),
        make_node("Reshape", [f"{name}attention", shape("joined", [batch, heads, tokens, width])], f"{name}joined"),
        make_node("Transpose", [f"{name}joined"], f"{name}tokens_first", perm=[0, 2, 1, 3]),
        make_node("Reshape", [f"{name}tokens_first", shape("flat", [batch, tokens, heads * width])], out),
    ]


def _capped(
    graph: Graph, task: Task, softcap: float, scale: float, inputs: Sequence[str], out: str, name: str
) -> list[onnx.NodeProto]:
    """The same in small steps, with a soft cap of the scores, which TensorRT's op refuses.

    Scores are [B, kv heads, group, S, window]: the queries of a group share a head of K and V.
    """
    if task.step is not None and task.step[1] == 1:
        return _capped_by_sums(graph, task, softcap, scale, inputs, out, name)
    query, key, value, mask = inputs
    shape = task.shape
    dtype = helper.tensor_dtype_to_np_dtype(task.float_type)

    def constant(called: str, value: float) -> str:
        return graph.add_constant(f"lowered.{called}", np.asarray(value).astype(dtype))

    groups = shape.num_heads // shape.num_kv_heads
    apart = graph.add_constant("lowered.groups_apart", [0, 0, shape.num_kv_heads, groups, shape.head_dim])
    together = graph.add_constant("lowered.groups_together", [0, 0, shape.num_heads * shape.head_dim])
    group = graph.add_constant("lowered.group_axis", [2])
    factor = constant("score_factor", (scale or shape.head_dim**-0.5) / softcap)
    return [
        make_node("Reshape", [query, apart], f"{name}apart"),
        make_node("Transpose", [f"{name}apart"], f"{name}groups", perm=[0, 2, 3, 1, 4]),
        make_node("Unsqueeze", [key, group], f"{name}key"),
        make_node("Unsqueeze", [value, group], f"{name}value"),
        make_node("Unsqueeze", [mask, group], f"{name}seen"),
        make_node("Transpose", [f"{name}key"], f"{name}key_columns", perm=[0, 1, 2, 4, 3]),
        make_node("Mul", [f"{name}groups", factor], f"{name}scaled"),
        make_node("MatMul", [f"{name}scaled", f"{name}key_columns"], f"{name}scores"),
        make_node("Tanh", [f"{name}scores"], f"{name}bounded"),
        make_node("Mul", [f"{name}bounded", constant("softcap", softcap)], f"{name}capped"),
        make_node("Where", [f"{name}seen", f"{name}capped", constant("unseen", _UNSEEN)], f"{name}masked"),
        make_node("Softmax", [f"{name}masked"], f"{name}weights", axis=-1),
        make_node("MatMul", [f"{name}weights", f"{name}value"], f"{name}attention"),
        make_node("Transpose", [f"{name}attention"], f"{name}tokens_first", perm=[0, 3, 1, 2, 4]),
        make_node("Reshape", [f"{name}tokens_first", together], out),
    ]


def _capped_by_sums(
    graph: Graph, task: Task, softcap: float, scale: float, inputs: Sequence[str], out: str, name: str
) -> list[onnx.NodeProto]:
    """The same in a step of one token: products and their sums, in float32.

    Scores are [B, kv heads, group, window]. Why: a matrix product of a cache is preceded by a copy of the cache, K's
    transposed; a sum reads it in place (plans of TensorRT-RTX 1.7.1).
    """
    query, key, value, mask = inputs
    shape, FLOAT = task.shape, onnx.TensorProto.FLOAT

    def constant(called: str, value: float) -> str:
        return graph.add_constant(f"lowered.float_{called}", np.asarray(value, np.float32))

    def axis(number: int) -> str:
        return graph.add_constant(f"lowered.axis_{number}", [number])

    groups = shape.num_heads // shape.num_kv_heads
    apart = graph.add_constant("lowered.token_groups", [-1, shape.num_kv_heads, groups, 1, shape.head_dim])
    together = graph.add_constant("lowered.token_together", [-1, 1, shape.num_heads * shape.head_dim])
    factor = constant("score_factor", (scale or shape.head_dim**-0.5) / softcap)
    return [
        make_node("Cast", [query], f"{name}query", to=FLOAT),
        make_node("Mul", [f"{name}query", factor], f"{name}scaled"),
        make_node("Reshape", [f"{name}scaled", apart], f"{name}groups"),
        make_node("Cast", [key], f"{name}key", to=FLOAT),
        make_node("Unsqueeze", [f"{name}key", axis(2)], f"{name}keys"),
        make_node("Mul", [f"{name}groups", f"{name}keys"], f"{name}by_key"),
        make_node("ReduceSum", [f"{name}by_key", axis(4)], f"{name}scores", keepdims=0),
        make_node("Tanh", [f"{name}scores"], f"{name}bounded"),
        make_node("Mul", [f"{name}bounded", constant("softcap", softcap)], f"{name}capped"),
        make_node("Where", [mask, f"{name}capped", constant("unseen", _UNSEEN)], f"{name}masked"),
        make_node("Softmax", [f"{name}masked"], f"{name}weights", axis=-1),
        make_node("Unsqueeze", [f"{name}weights", axis(4)], f"{name}weight"),
        make_node("Cast", [value], f"{name}value", to=FLOAT),
        make_node("Unsqueeze", [f"{name}value", axis(2)], f"{name}values"),
        make_node("Mul", [f"{name}weight", f"{name}values"], f"{name}by_value"),
        make_node("ReduceSum", [f"{name}by_value", axis(3)], f"{name}sums", keepdims=0),
        make_node("Cast", [f"{name}sums"], f"{name}attention", to=task.float_type),
        make_node("Reshape", [f"{name}attention", together], out),
    ]


def rotate_by_head(graph: Graph, task: Task) -> int:
    """Let RotaryEmbedding run over [1, heads, S, D].

        x [1, S, heads x D] -> RotaryEmbedding -> out      becomes
        x -> Reshape -> Transpose -> RotaryEmbedding -> Transpose -> Reshape -> out

    Why: TensorRT splits off the heads with a -1, which is undefined if no row is kept.
    """

    def rotate(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "RotaryEmbedding":
            return None
        heads = attribute(node, "num_heads")
        graph.expect(heads, node, "the attribute num_heads", "none")
        name, rotated = f"{node.name}.", attribute(node, "rotary_embedding_dim")
        part = {"rotary_embedding_dim": rotated} if rotated else {}
        apart, together = _shapes(graph, heads, task.shape.head_dim)
        return [
            make_node("Reshape", [node.input[0], apart], f"{name}apart"),
            make_node("Transpose", [f"{name}apart"], f"{name}heads", perm=[0, 2, 1, 3]),
            make_node("RotaryEmbedding", [f"{name}heads", *node.input[1:]], f"{name}rotated", **part),
            make_node("Transpose", [f"{name}rotated"], f"{name}tokens_first", perm=[0, 2, 1, 3]),
            make_node("Reshape", [f"{name}tokens_first", together], node.output[0]),
        ]

    return graph.rewrite(rotate)


def _shapes(graph: Graph, heads: int, width: int) -> tuple[str, str]:
    """Shapes that split the heads and join them again.

    The sizes are written as "copy that axis" and numbers, never as -1: S may be a number of kept rows, and 0.
    """
    apart = graph.add_constant(f"lowered.apart_{heads}", [0, 0, heads, width])
    return apart, graph.add_constant(f"lowered.together_{heads}", [0, 0, heads * width])
