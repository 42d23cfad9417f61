"""The form that ONNX Runtime runs best on a CPU: one sequence, K/V in place, skipped branches not entered.

What changes against the portable graph (all measured, benchmarks/RESULTS.md):

- the cache is a buffer of fixed capacity per layer; TensorScatter writes this call's K and V into it, and nothing
  is copied, since input and outputs are bound to the same memory;
- attention is the contrib op GroupQueryAttention with an empty new key: it reads the buffer up to the current
  length, where ONNX's Attention costs the whole capacity. Kept rows attend with their rows of the mask, as a bias:
  the op's own mask is causal from the end, which allows at least what a kept row may see;
- the nodes of a branch stand inside `If`, which is not entered when no row is kept;
- the head runs on the columns that are asked for, in generation the last one.

Limits: batch 1 without padding, float32.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from engines.bundle.manifest import Manifest
from engines.lowering.regions import CHOICES, find_regions, size_name, wrap

CONTRIB = "com.microsoft"
OPSET = 24  # TensorScatter
# Added to the attention score of what a row may not see; exp() of it is 0 in float32.
MASKED = -1e9
# Further inputs of the lowered graph, and its output of kept rows by branch.
WRITE_AT, LAST_COLUMN, TOTAL, LOGITS_FROM, KEPT = "write_at", "last_column", "total_length", "logits_from", "kept"


def appended_name(layer: int, kv: str) -> str:
    """The output that is the cache with this call's K or V written in."""
    return f"appended.{layer}.{kv}"


def lower(portable: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    """The lowered form of a portable `model.onnx` (its weights stay external).

    Inputs besides those of the portable graph: `write_at` [1] int64, the length before the call; `last_column` [1]
    int32, the length after it minus 1; `total_length` [] int32, the length after it; `logits_from` [1] int64, the
    first column of the call whose logits are wanted. Cache inputs and outputs have the axis `capacity`. For each
    of them the output `appended...` must be bound to the same memory.
    """
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    graph = model.graph
    layers = manifest.decoder.num_layers
    caches = [(i, kv) for i in range(layers) for kv in ("key", "value")]
    _cache_in_place(graph, caches)
    _attention(graph, manifest)
    _regions(graph, layers)
    _last_logits(graph, layers)
    _kept_output(graph)
    _drop_defaults(graph)
    graph.input.append(helper.make_tensor_value_info(WRITE_AT, TensorProto.INT64, [1]))
    graph.input.append(helper.make_tensor_value_info(LAST_COLUMN, TensorProto.INT32, [1]))
    graph.input.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT32, []))
    graph.input.append(helper.make_tensor_value_info(LOGITS_FROM, TensorProto.INT64, [1]))
    del model.opset_import[:]
    model.opset_import.extend(
        [helper.make_opsetid("", OPSET), helper.make_opsetid("gsx", 1), helper.make_opsetid(CONTRIB, 1)]
    )
    for function in model.functions:
        function.opset_import[0].version = OPSET
    return model


@functools.cache
def is_supported(head_dim: int) -> bool:
    """Whether this ONNX Runtime has the form of GroupQueryAttention that the lowering needs.

    It is run once for each head size (which must be a multiple of 8 in ONNX Runtime 1.31) and compared.
    """
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((1, 1, 4, head_dim), np.float32) for _ in range(2))
    query = rng.standard_normal((1, 2, 2 * head_dim), np.float32)
    bias = np.where(np.array([[1, 0, 0], [1, 1, 0]], bool), 0, MASKED).astype(np.float32)[None, None]
    names = {"query": query, "key": key, "value": value, "bias": bias}
    empty = numpy_helper.from_array(np.zeros((1, 0, head_dim), np.float32), "empty")
    constants = [
        empty,
        numpy_helper.from_array(np.array([2], np.int32), "last"),
        numpy_helper.from_array(np.array(3, np.int32), "total"),
    ]
    node = _gqa("query", "empty", "key", "value", "last", "total", "bias", ["out", "k", "v"], 2, 1, "probe")
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in names.items()}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("out", "k", "v")]
    model = helper.make_model(
        helper.make_graph([node], "probe", list(values.values()), outputs, initializer=constants),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=11,
    )
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(["out"], names)[0]
    except Exception:  # any refusal means that this version does not have the form
        return False
    heads = query.reshape(2, 2, head_dim).transpose(1, 0, 2)
    scores = heads @ key[0, 0, :3].T / np.sqrt(head_dim) + bias[0, 0]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = (weights / weights.sum(axis=-1, keepdims=True)) @ value[0, 0, :3]
    return bool(np.abs(found.reshape(2, 2, head_dim) - expected.transpose(1, 0, 2)).max() < 1e-5)


def _cache_in_place(graph: onnx.GraphProto, caches: list[tuple[int, str]]) -> None:
    """present = Concat(past, new) -> appended = TensorScatter(past, new) at the current length."""
    producers = {node.output[0]: node for node in graph.node}
    for layer, kv in caches:
        node = producers[f"present.{layer}.{kv}"]
        assert node.op_type == "Concat", "the cache is appended to by Concat in the portable graph"
        node.op_type = "TensorScatter"
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", 2))
        node.input.append(WRITE_AT)
        node.output[0] = appended_name(layer, kv)
    values = {value.name: value for value in [*graph.input, *graph.output]}
    for layer, kv in caches:
        past, present = values[f"past_key_values.{layer}.{kv}"], values[f"present.{layer}.{kv}"]
        for value in (past, present):
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"
        appended = graph.output.add()
        appended.CopyFrom(present)
        appended.name = appended_name(layer, kv)


def _attention(graph: onnx.GraphProto, manifest: Manifest) -> None:
    """Attention ops -> GroupQueryAttention over the buffer."""
    shape = manifest.decoder
    empty = np.zeros((1, 0, shape.num_kv_heads * shape.head_dim), np.float32)
    graph.initializer.append(numpy_helper.from_array(empty, "lowered.empty"))
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "lowered.first"))
    nodes: list[onnx.NodeProto] = []
    biases: dict[str, str] = {}
    layer = 0
    for node in graph.node:
        if node.op_type not in ("GatheredAttention", "FullAttention"):
            nodes.append(node)
            continue
        gathered = node.op_type == "GatheredAttention"
        name, window = f"layers.{layer}.lowered.", shape.windows[layer]
        mask = node.input[-1]
        if mask not in biases:
            biases[mask] = f"lowered.bias.{mask}"
            bias_nodes = _bias(graph, mask, biases[mask])
            place = max(n for n, other in enumerate(nodes) if mask in other.output) + 1
            nodes[place:place] = bias_nodes
        query, bias = node.input[0], biases[mask]
        if gathered:
            query, bias = name + "query", name + "bias"
            nodes.append(helper.make_node("Unsqueeze", [node.input[0], "lowered.first"], [query], name=query))
            nodes.append(
                helper.make_node("Gather", [biases[mask], node.input[1]], [bias], name=bias, axis=2)
            )
        elif window is None:
            bias = ""  # the op's own causal mask is the whole mask
        out = name + "attended" if gathered else node.output[0]
        nodes.append(
            _gqa(
                query,
                "lowered.empty",
                appended_name(layer, "key"),
                appended_name(layer, "value"),
                LAST_COLUMN,
                TOTAL,
                bias,
                [out, f"present.{layer}.key", f"present.{layer}.value"],
                shape.num_heads,
                shape.num_kv_heads,
                name + "attention",
            )
        )
        if gathered:
            nodes.append(
                helper.make_node("Squeeze", [out, "lowered.first"], [node.output[0]], name=name + "rows")
            )
        layer += 1
    assert layer == shape.num_layers
    del graph.node[:]
    graph.node.extend(nodes)


def _gqa(
    query: str,
    empty: str,
    key: str,
    value: str,
    last: str,
    total: str,
    bias: str,
    outputs: list[str],
    heads: int,
    kv_heads: int,
    name: str,
) -> onnx.NodeProto:
    inputs = [query, empty, empty, key, value, last, total, "", "", "", bias]
    while not inputs[-1]:
        inputs.pop()
    return helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        name=name,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv_heads,
    )


def _bias(graph: onnx.GraphProto, mask: str, name: str) -> list[onnx.NodeProto]:
    """The mask [B, 1, S, T] as a float bias of the same shape."""
    for constant, number in (("lowered.seen", 0.0), ("lowered.masked", MASKED)):
        if constant not in {tensor.name for tensor in graph.initializer}:
            graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), constant))
    return [helper.make_node("Where", [mask, "lowered.seen", "lowered.masked"], [name], name=name)]


def _regions(graph: onnx.GraphProto, layers: int) -> None:
    """Each branch's nodes into an `If`."""
    presents = [f"present.{i}.{kv}" for i in range(layers) for kv in ("key", "value")]
    regions = find_regions(graph, presents)
    nodes: list[onnx.NodeProto] = []
    ends = {region.add.output[0]: region for region in regions}
    member_names = {node.name for region in regions for node in region.nodes}
    for node in graph.node:
        if node.name in member_names:
            continue
        region = ends.get(node.output[0])
        if region is None:
            nodes.append(node)
            continue
        carried = [
            (name, name.replace("present.", "appended."))
            for member in region.nodes
            for name in member.output
            if name in presents
        ]
        nodes += wrap(region, carried, f"{region.choice.output[2]}.")
    copies = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _last_logits(graph: onnx.GraphProto, layers: int) -> None:
    """Only the wanted columns of the last state go through the final norm and the head."""
    state, wanted = f"layers.{layers - 1}.output", "lowered.wanted"
    for name, values in (("lowered.ends", [np.iinfo(np.int64).max]), ("lowered.axis", [1])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    place, shaped = next(
        (n, node.output[0]) for n, node in enumerate(graph.node) if node.op_type == "Reshape" and node.input[0] == state
    )
    for node in graph.node:
        node.input[:] = [wanted if name == shaped else name for name in node.input]
    inputs = [shaped, LOGITS_FROM, "lowered.ends", "lowered.axis"]
    graph.node.insert(place + 1, helper.make_node("Slice", inputs, [wanted], name=wanted))


def _kept_output(graph: onnx.GraphProto) -> None:
    """One output with the kept rows of every branch, in order."""
    choices = [node for node in graph.node if node.op_type in CHOICES]
    if not choices:
        return
    graph.node.append(helper.make_node("Concat", [size_name(c) for c in choices], [KEPT], name=KEPT, axis=0))
    graph.output.append(helper.make_tensor_value_info(KEPT, TensorProto.INT64, [len(choices)]))


def _drop_defaults(graph: onnx.GraphProto) -> None:
    """Inputs with a default value become plain inputs: only those can be bound to memory."""
    inputs = {value.name for value in graph.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in inputs]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    out = onnx.NodeProto()
    out.CopyFrom(node)
    return out
