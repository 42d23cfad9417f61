"""Rotary embedding inside of attention, from tables for all positions."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.bundle.tensor_names import POSITION_IDS
from gsx_engines.lowering.for_onnxruntime.task import FIRST, Task
from gsx_plugins.graph import Graph, attribute, make_node

# Prefix of further inputs of a lowered graph: the cosines and sines of all positions that fit into the cache,
# [capacity, W/2], by their names in the portable graph (W is the part of a head that is rotated).
TABLE_PREFIX = "rotary."
# Inputs of GroupQueryAttention.
_QUERY, _KEY, _VALUE, _COS, _SIN = 0, 1, 2, 7, 8
# The op rotates only heads, and parts of heads, of a multiple of this size.
_HEAD_MULTIPLE = 16
# In steps, the shape of Q, K and V of one token per sequence.
_EACH_ITS_OWN = "rotary.each_its_own"


def rotate_in_attention(graph: Graph, task: Task) -> int:
    """Let attention over all rows rotate queries and keys, and take them with the values as one tensor.

        Split(qkv) -> q, k, v; q -> RotaryEmbedding, k -> RotaryEmbedding, v -> GroupQueryAttention      becomes
        qkv, tables -> GroupQueryAttention

    Why: four nodes of a layer go. It needs Q, K and V to be parts of one product (`packed.pack_products`), with nothing
    between it and the rotation, tables that depend only on the position, and a head size that the op rotates.
    Returns: how many attentions.
    """
    if task.shape.head_dim % _HEAD_MULTIPLE:
        return 0
    if task.steps:
        heads = task.shape.num_heads + 2 * task.shape.num_kv_heads
        graph.add_constant(_EACH_ITS_OWN, [-1, 1, heads * task.shape.head_dim])
    used: dict[str, None] = {}
    count = 0
    attentions = [
        (part, node) for part in graph.parts() for node in part.nodes if node.op_type == "GroupQueryAttention"
    ]
    for part, node in attentions:
        found = _packed(graph, part, task, node)
        if found is None:
            continue
        split, tables = found
        whole, query = split.input[0], f"{node.name}.packed"
        if task.steps:
            made = make_node("Reshape", [whole, _EACH_ITS_OWN], query)
        else:
            made = make_node("Unsqueeze", [whole, FIRST], query)
        rest = list(node.input) + [""] * (_SIN + 1 - len(node.input))
        rest[_QUERY], rest[_KEY], rest[_VALUE] = query, "", ""
        rest[_COS], rest[_SIN] = tables
        part.insert_before(node, made)
        part.set_inputs(node, rest)
        node.attribute.append(helper.make_attribute("do_rotary", 1))
        used |= dict.fromkeys(tables)
        count += 1
    for name in used:
        graph.proto.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["positions", None]))
    graph.drop_unread()
    return count


def tables_of(portable: onnx.GraphProto, lowered: onnx.GraphProto) -> onnx.GraphProto | None:
    """The graph that computes the tables that a lowered graph reads; None if it reads none.

    Returns: position_ids [1, N] -> each of them by its name without the prefix, [1, N, W/2].
    """
    names = [one.name.removeprefix(TABLE_PREFIX) for one in lowered.input if one.name.startswith(TABLE_PREFIX)]
    if not names:
        return None
    made = onnx.GraphProto()
    made.CopyFrom(portable)
    graph = Graph(made)
    graph.keep_inputs(lambda name: name == POSITION_IDS)
    graph.set_outputs([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None]) for name in names])
    graph.drop_unread()
    graph.store()
    return made


def _depends_on_positions(graph: Graph, name: str) -> bool:
    """Whether a value is computed from each token's position and constants, and from nothing else.

    Where frequencies depend on the length of the text, a call reads its last position: no table holds for every call.
    """
    wanted, inputs = [name], {value.name for value in graph.proto.input}
    while wanted:
        value = wanted.pop()
        node = graph.producer(value)
        if node is not None and node.op_type.startswith("Reduce"):
            return False
        if node is not None:
            wanted += graph.reads(node)
        elif value in inputs and value != POSITION_IDS and value not in graph.constants:
            return False
    return True


def _packed(
    graph: Graph, part: Graph, task: Task, node: onnx.NodeProto
) -> tuple[onnx.NodeProto, tuple[str, str]] | None:
    """The Split whose three parts, queries and keys rotated, an attention reads, and the inputs with its tables.

    None if it reads anything else.
    """
    if not node.input[_KEY]:
        return None
    turned, angles = [], set[tuple[str, str]]()
    for place in (_QUERY, _KEY):
        rotation = _behind(part, node.input[place], "Reshape" if task.steps else "")
        if rotation is None or rotation.op_type != "RotaryEmbedding" or attribute(rotation, "interleaved"):
            return None
        if attribute(rotation, "rotary_embedding_dim") % _HEAD_MULTIPLE:
            return None
        cos, sin = rotation.input[1:]
        angles.add((cos, sin))
        turned.append(rotation.input[0])
    if len(angles) > 1 or not all(_depends_on_positions(graph, name) for name in (cos, sin)):
        return None
    made = [_behind(part, name, "Unsqueeze") for name in turned]
    made.append(_behind(part, node.input[_VALUE], "Reshape" if task.steps else "Unsqueeze"))
    split = made[0]
    if split is None or split.op_type != "Split" or any(one is not split for one in made):
        return None
    values = part.expect_producer(node.input[_VALUE]).input[0]
    heads = (task.shape.num_heads, task.shape.num_kv_heads, task.shape.num_kv_heads)
    widths = [count * task.shape.head_dim for count in heads]
    in_order = list(split.output) == [*(part.expect_producer(name).input[0] for name in turned), values]
    if not in_order or numpy_helper.to_array(graph.constants[split.input[1]]).tolist() != widths:
        return None
    return split, (TABLE_PREFIX + cos, TABLE_PREFIX + sin)


def _behind(graph: Graph, value: str, shaping: str) -> onnx.NodeProto | None:
    """What makes a value, behind a node that only shapes it."""
    node = graph.producer(value)
    if shaping:
        if node is None or node.op_type != shaping:
            return None
        return graph.producer(node.input[0])
    return node
