"""K and V in 8 bits: codes by a scale for each head, where a graph has numbers of its own type.

The portable graph knows nothing of it. Two forms are made of it when it is loaded: the fast one (`onnxruntime.py`)
keeps codes; the portable one rounds what it appends to the cache to the same values, and keeps them in its own type.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.bundle.manifest import KvCache
from gsx_engines.lowering.nodes import replace_nodes

KINDS = ("key", "value")
_HEADS_AXIS = 1


def add_head_scales(graph: onnx.GraphProto, kv_cache: KvCache, layers: Iterable[int]) -> None:
    """Constants for `quantize`."""
    for layer in layers:
        for kv, scales in zip(KINDS, kv_cache.scales[layer], strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array(scales, np.float32), _of_heads(layer, kv)))


def add_channel_scales(graph: onnx.GraphProto, kv_cache: KvCache, layers: Iterable[int], head_dim: int) -> None:
    """Constants for GroupQueryAttention, [1, kv heads, 1, D]: it takes no scale for a head alone."""
    for layer in layers:
        for kv, scales in zip(KINDS, kv_cache.scales[layer], strict=True):
            repeated = np.repeat(np.array(scales, np.float32)[None, :, None, None], head_dim, axis=3)
            graph.initializer.append(numpy_helper.from_array(repeated, of_channels(layer, kv)))


def of_channels(layer: int, kv: str) -> str:
    """A layer's scales, one for each channel of each head."""
    return f"lowered.channel_scales.{layer}.{kv}"


def _of_heads(layer: int, kv: str) -> str:
    return f"lowered.head_scales.{layer}.{kv}"


def quantize(new: str, layer: int, kv: str) -> onnx.NodeProto:
    """K or V [B, kv heads, S, D] -> its codes."""
    codes = f"lowered.codes.{layer}.{kv}"
    attributes = {"axis": _HEADS_AXIS, "output_dtype": TensorProto.INT8}
    return helper.make_node("QuantizeLinear", [new, _of_heads(layer, kv)], [codes], name=codes, **attributes)


def round_cache(graph: onnx.GraphProto, kv_cache: KvCache, layers: Iterable[int]) -> None:
    """In a portable graph, what is appended to the cache is rounded to what its codes stand for."""
    add_head_scales(graph, kv_cache, layers)
    places = {f"present.{layer}.{kv}": (layer, kv) for layer in layers for kv in KINDS}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in places:
            layer, kv = places[node.output[0]]
            codes = quantize(node.input[1], layer, kv)
            rounded = f"lowered.rounded.{layer}.{kv}"
            inputs = [codes.output[0], _of_heads(layer, kv)]
            nodes.append(codes)
            nodes.append(helper.make_node("DequantizeLinear", inputs, [rounded], name=rounded, axis=_HEADS_AXIS))
            node.input[1] = rounded
        nodes.append(node)
    replace_nodes(graph, nodes)


def hold_codes(graph: onnx.GraphProto) -> None:
    """Inputs and outputs of a lowered graph that are the cache have its type."""
    caches = ("past_key_values.", "present.", "appended.")
    for value in [*graph.input, *graph.output]:
        if value.name.startswith(caches):
            value.type.tensor_type.elem_type = TensorProto.INT8
