"""Attention of a step as one plugin: RoPE, writing K and V into the cache, and attention over the columns in use.

TensorRT's own attention reads the whole buffers, filled or not, and reads them also for a token that skips the branch.
The plugin (`plugins/gsx_plugins/step_attention`) reads the decision first, then only the columns that the mask shows.
It writes K and V of all tokens where TensorScatter would. `present.*` must share the memory of `past_key_values.*`, as
it does wherever K and V are in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto

from gsx_engines.lowering.for_tensorrt.predicated import Decision, decision_of
from gsx_engines.lowering.for_tensorrt.step_weights import has_step_plugins, step_plugin
from gsx_engines.lowering.for_tensorrt.task import WRITE_AT, Task
from gsx_plugins.graph import Graph, attribute, make_node, number

# What the kernel asks of heads (`plugins/gsx_plugins/step_attention/kernel.h`).
MOST_HEAD_WIDTH, CHANNELS_AT_A_TIME = 256, 8
_HEADS_FIRST = [0, 2, 1, 3]
_LAYOUT_OPS = ("Reshape", "Unsqueeze", "Squeeze")  # elements stay where they are


@dataclass(frozen=True)
class _Rows:
    """Rows of queries or keys: by token, then by head.

    Args: tables: cosines and sines of the RoPE that is still to come; half: channels that each of them turns.
    """

    name: str
    tables: tuple[str, str] | None = None
    half: int = 0


@dataclass(frozen=True)
class _Write:
    """A cache that gets a call's columns.

    Args: node: its TensorScatter; layer: whose cache it is, in a looped model the visit; rows: what is written, by
        token; alone: whether nothing else reads that.
    """

    node: onnx.NodeProto
    layer: int
    rows: str
    alone: bool


def attend_in_steps(graph: Graph, task: Task) -> int:
    """Let a plugin do the attention of a step of few rows in 16 bits.

        query -> RotaryEmbedding -> GatheredAttention(K of the cache, V of the cache, mask)
        k -> RotaryEmbedding -> TensorScatter -> K of the cache;  v -> TensorScatter -> V of the cache      become
        SkipAttention(query, k and v, cos, sin, mask, write_at, past K and V, score, bound) -> rows, K, V of the cache

    and FullAttention, or with rows chosen by rank, StepAttention, which has no score and no bound. Where the host
    decided, it gets as many queries as there are rows, all or none. A value without RoPE, or one whose rotated form
    others read, goes in as it is. Elsewhere attention stays TensorRT's: where a cache is written otherwise (loops that
    share one), and for heads that the kernel does not take.

    Returns: how many.
    """
    width = task.shape.head_dim
    fits = width <= MOST_HEAD_WIDTH and width % CHANNELS_AT_A_TIME == 0
    if not has_step_plugins(task) or task.float_type == TensorProto.FLOAT or not fits:
        return 0
    made: dict[str, list[onnx.NodeProto]] = {}  # by the attention's output
    written: set[str] = set()  # outputs of TensorScatter nodes that go
    for node in graph.nodes:
        nodes = _step_attention(graph, task, node, written)
        if nodes is not None:
            made[node.output[0]] = nodes
    graph.rewrite(lambda node: made.get(node.output[0], [] if node.output[0] in written else None))
    graph.drop_unread()
    return len(made)


def _step_attention(graph: Graph, task: Task, node: onnx.NodeProto, written: set[str]) -> list[onnx.NodeProto] | None:
    """The nodes in the place of an attention, or None. Adds the outputs of the TensorScatter nodes that go."""
    decision: Decision | None = None
    if node.op_type == "GatheredAttention" and node.input[1] in task.masks:
        query, index, key, value, mask = graph.expect_inputs(node, 5)
        decision = decision_of(graph, task.masks[index])
    elif node.op_type == "GatheredAttention" and node.input[1] in task.whole_rows:
        query, _, key, value, mask = graph.expect_inputs(node, 5)
    elif node.op_type == "FullAttention":
        query, key, value, mask = graph.expect_inputs(node, 4)
    else:
        return None
    writes = [_write(graph, task, *one, node) for one in ((key, "key"), (value, "value"))]
    keys, values = writes
    if keys is None or values is None:
        return None
    written.update((keys.node.output[0], values.node.output[0]))
    turned, new = _before_rope(graph, task, query), _before_rope(graph, task, keys.rows)
    if not keys.alone or new.tables not in (None, turned.tables):
        new = _Rows(keys.rows)
    return _nodes(graph, task, node, (turned, new), (keys, values), mask, decision)


def _write(graph: Graph, task: Task, cache: str, kind: str, reader: onnx.NodeProto) -> _Write | None:
    """How a cache is written that only this attention reads; None if in another way, or if others read the buffer."""
    node = graph.producer(cache)
    if node is None or node.op_type != "TensorScatter" or list(graph.users(cache)) != [reader]:
        return None
    # TensorRT does not know that the plugin writes there, so nobody else's read may be put behind it.
    if any(user is not node and user.op_type != "Shape" for user in graph.users(node.input[0])):
        return None
    heads_first = graph.producer(node.input[1])
    if heads_first is None or heads_first.op_type != "Transpose" or list(heads_first.attribute[0].ints) != _HEADS_FIRST:
        return None
    layers = {task.shape.present_of(layer, kind): layer for layer in task.shape.left_caches}
    new = node.input[1]
    return _Write(
        node, layers[cache], heads_first.input[0], len(graph.users(new)) == 1 and new not in graph.output_names
    )


def _before_rope(graph: Graph, task: Task, name: str) -> _Rows:
    """What RoPE turned into a value, if nothing else reads the turned one; else the value itself."""
    at = name
    while len(graph.users(at)) == 1 and (node := graph.producer(at)) is not None:
        if node.op_type == "RotaryEmbedding":
            half = (attribute(node, "rotary_embedding_dim") or task.shape.head_dim) // 2
            if len(node.input) == 3 and not attribute(node, "interleaved") and half % CHANNELS_AT_A_TIME == 0:
                cos, sin = (_of_all_tokens(graph, task, table) for table in node.input[1:])
                return _Rows(node.input[0], (cos, sin), half)
            break
        if node.op_type not in _LAYOUT_OPS and not _takes_the_only_one(graph, node):
            break
        at = node.input[0]
    return _Rows(name)


def _of_all_tokens(graph: Graph, task: Task, table: str) -> str:
    """What a table of RoPE was cut from for the rows that the host decided on, which are all tokens or none."""
    cut = graph.producer(table)
    is_cut = cut is not None and cut.op_type == "Slice" and cut.input[2] in task.whole_rows.values()
    return cut.input[0] if cut is not None and is_cut else table


def _takes_the_only_one(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a Gather takes off an axis that RoPE's rows [1, N, ..] got in front."""
    if node.op_type != "Gather" or attribute(node, "axis", 0) != 0 or graph.number(node.input[1]) != 0:
        return False
    turned = graph.producer(node.input[0])
    return turned is not None and turned.op_type == "RotaryEmbedding"


def _nodes(
    graph: Graph,
    task: Task,
    replaced: onnx.NodeProto,
    rows: tuple[_Rows, _Rows],
    writes: tuple[_Write, _Write],
    mask: str,
    decision: Decision | None,
) -> list[onnx.NodeProto]:
    """The plugin, and reshapes around it. Args: rows: of queries and of new keys."""
    assert task.step is not None
    batch, tokens = task.step
    shape, name, out = task.shape, f"{replaced.name}.", replaced.output[0]
    (query, key), (keys, values) = rows, writes
    own, shared = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    nodes: list[onnx.NodeProto] = []

    def by_row(value: str, called: str, width: int) -> str:
        """A value as [N, width]."""
        size = graph.add_constant(f"lowered.step_rows_{width}", [batch * tokens, width])
        nodes.append(make_node("Reshape", [value, size], f"{name}{called}"))
        return nodes[-1].output[0]

    new = [by_row(key.name, "key", shared), by_row(values.rows, "value", shared)]
    nodes.append(make_node("Concat", new, f"{name}new", axis=1))  # so that TensorRT makes both as one product
    whole = replaced.op_type == "FullAttention"
    if whole or replaced.input[1] in task.masks:
        flat = [by_row(query.name, "query", own), f"{name}new"]
    elif query.tables is None:
        flat = [query.name, f"{name}new"]
    else:  # RoPE takes rows [1, n, heads x D]; n may be 0, which a Reshape would take for something else
        nodes.append(make_node("Squeeze", [query.name, graph.add_constant("lowered.first", [0])], f"{name}query"))
        flat = [f"{name}query", f"{name}new"]
    if query.tables is None:
        flat += [new[0], new[0]]  # the plugin does not read these two
    else:
        flat += [by_row(table, called, query.half) for table, called in zip(query.tables, ("cos", "sin"), strict=True)]
    flat += [mask, WRITE_AT, keys.node.input[0], values.node.input[0]]
    rows_out = f"{name}rows" if whole else out
    nodes.append(
        step_plugin(
            "StepAttention" if decision is None else "SkipAttention",
            [*flat, *(() if decision is None else (decision.score, decision.bound))],
            [rows_out, keys.node.output[0], values.node.output[0]],
            rotate_query=float(query.tables is not None),
            rotate_key=float(key.tables is not None),
            scale=number(replaced, "scale"),
            softcap=number(replaced, "softcap"),
            window=float(shape.windows[keys.layer] or 0),
        )
    )
    if whole:
        size = graph.add_constant("lowered.step_sequences", [batch, tokens, own])
        nodes.append(make_node("Reshape", [rows_out, size], out))
    task.forms[replaced.op_type] = "plugin" if decision is None else "predicated"
    return nodes
