"""The attention of a step in standard ops, as `plugins/gsx_plugins/step_attention/kernel.h` defines it, for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from gsx_engines.bundle.manifest import DecoderShape
from gsx_plugins.graph import Graph, make_node, number

# What rows hold that are not kept: the rule leaves it open.
_OPEN = 7.0


def spell_step_attention(graph: onnx.GraphProto, shape: DecoderShape) -> None:
    """Replace SkipAttention and StepAttention nodes. Cap and scale stay attributes of an Attention node."""
    edited = Graph(graph)

    def spelled(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        return _spelled(edited, node, shape) if node.op_type in ("SkipAttention", "StepAttention") else None

    edited.rewrite(spelled)
    edited.store()


def _spelled(graph: Graph, node: onnx.NodeProto, shape: DecoderShape) -> list[onnx.NodeProto]:
    query, new, cos, sin, mask, write_at, past_key, past_value = node.input[:8]
    key, value = next(made.input for made in graph.nodes if new in made.output)  # of their Concat
    out, present_key, present_value = node.output
    ids = next(one for one in graph.proto.input if one.name == "input_ids")
    batch, tokens = (axis.dim_value for axis in ids.type.tensor_type.shape.dim)
    name, nodes = f"{node.name}.", list[onnx.NodeProto]()

    def add(op: str, inputs: Sequence[str], called: str, **attributes: Any) -> str:
        nodes.append(make_node(op, inputs, f"{name}{called}", **attributes))
        return nodes[-1].output[0]

    def sizes(*numbers: int) -> str:
        return graph.add_constant("lowered.cpu_" + "_".join(map(str, numbers)), np.array(numbers))

    def by_head(rows: str, heads: int, called: str, turned: bool) -> str:
        """Rows [N, heads x D] as [B, heads, S, D], after RoPE."""
        apart = add("Reshape", [rows, sizes(batch, tokens, heads, shape.head_dim)], f"{called}.apart")
        first = add("Transpose", [apart], f"{called}.heads", perm=[0, 2, 1, 3])
        if not turned:
            return first
        tables = [add("Reshape", [one, sizes(batch, tokens, -1)], f"{called}.{one}") for one in (cos, sin)]
        half = next(graph.constants[made.input[1]] for made in graph.nodes if cos in made.output)
        width = 2 * int(onnx.numpy_helper.to_array(half)[1])
        part = {"rotary_embedding_dim": width} if width < shape.head_dim else {}
        return add("RotaryEmbedding", [first, *tables], f"{called}.turned", **part)

    # The queries of no token or of all, with zeros where there are none.
    count = add("Shape", [query], "count", end=1)
    rows, queried = sizes(batch * tokens), sizes(batch * tokens, shape.num_heads * shape.head_dim)
    zeros = add("Expand", [add("CastLike", [sizes(0), query], "zero"), queried], "zeros")
    padded = add("Concat", [query, zeros], "padded", axis=0)
    query = add("Slice", [padded, sizes(0), rows, sizes(0)], "every")
    queries = by_head(query, shape.num_heads, "query", number(node, "rotate_query") != 0)
    for rows, past, present, turned in (
        (key, past_key, present_key, number(node, "rotate_key") != 0),
        (value, past_value, present_value, False),
    ):
        new = by_head(rows, shape.num_kv_heads, present, turned)
        nodes.append(helper.make_node("TensorScatter", [past, new, write_at], [present], name=present, axis=2))
    kept = {called: number(node, called) for called in ("scale", "softcap")}
    attended = add("Attention", [queries, present_key, present_value, mask], "attended", **kept)
    tokens_first = add("Transpose", [attended], "tokens_first", perm=[0, 2, 1, 3])
    flat = sizes(batch * tokens, shape.num_heads * shape.head_dim)
    if node.op_type == "StepAttention":
        every = add("Reshape", [tokens_first, flat], "rows")
        return [*nodes, make_node("Slice", [every, sizes(0), count, sizes(0)], out)]
    rows = add("Reshape", [tokens_first, flat], "rows")
    keeps = add("Greater", list(node.input[8:]), "keeps")
    column = add("Unsqueeze", [keeps, sizes(-1)], "column")
    number_left = graph.add_constant("lowered.cpu_open", np.array(_OPEN, np.float32))
    left = add("CastLike", [number_left, rows], "left")
    return [*nodes, make_node("Where", [column, rows, left], out)]
