"""K and V in 8 bits: codes with a scale for each head, in place of numbers of the graph's own type.

The portable graph has no codes. It is rewritten when it is loaded: the fast form (`onnxruntime.py`) stores codes; the
portable form rounds what it appends to the cache to the same values, and stores them in its own type.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto

from gsx_engines.bundle.manifest import KvCache
from gsx_plugins.graph import Graph, make_node

KINDS = ("key", "value")
_HEADS_AXIS = 1


def add_head_scales(graph: Graph, kv_cache: KvCache, layers: Iterable[int]) -> None:
    """Constants for `quantize`."""
    for layer in layers:
        for kv, scales in zip(KINDS, kv_cache.scales[layer], strict=True):
            graph.add_constant(_of_heads(layer, kv), np.array(scales, np.float32))


def add_channel_scales(graph: Graph, kv_cache: KvCache, layers: Iterable[int], head_dim: int) -> None:
    """Constants for GroupQueryAttention, [1, kv heads, 1, D]: it takes scales by channel only."""
    for layer in layers:
        for kv, scales in zip(KINDS, kv_cache.scales[layer], strict=True):
            repeated = np.repeat(np.array(scales, np.float32)[None, :, None, None], head_dim, axis=3)
            graph.add_constant(of_channels(layer, kv), repeated)


def of_channels(layer: int, kv: str) -> str:
    """A layer's scales, one for each channel of each head."""
    return f"lowered.channel_scales.{layer}.{kv}"


def _of_heads(layer: int, kv: str) -> str:
    return f"lowered.head_scales.{layer}.{kv}"


def quantize(new: str, layer: int, kv: str) -> onnx.NodeProto:
    """K or V [B, kv heads, S, D] -> its codes."""
    scales, codes = _of_heads(layer, kv), f"lowered.codes.{layer}.{kv}"
    return make_node("QuantizeLinear", [new, scales], codes, axis=_HEADS_AXIS, output_dtype=TensorProto.INT8)


def round_cache(graph: Graph, kv_cache: KvCache, layers: Iterable[int]) -> int:
    """In a portable graph, round what is appended to the cache to the values of its codes.

        past, new -> Concat -> present      becomes
        past, (new -> QuantizeLinear -> DequantizeLinear) -> Concat -> present

    Why: parity is measured on the portable graph, and must see the values of the codes in a lowered graph.
    """
    layers = list(layers)
    add_head_scales(graph, kv_cache, layers)
    places = {f"present.{layer}.{kv}": (layer, kv) for layer in layers for kv in KINDS}

    def rounded(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.output[0] not in places:
            return None
        layer, kv = places[node.output[0]]
        past, new = graph.expect_inputs(node, 2)
        codes = quantize(new, layer, kv)
        out = f"lowered.rounded.{layer}.{kv}"
        node.input[:] = [past, out]
        inputs = [codes.output[0], _of_heads(layer, kv)]
        return [codes, make_node("DequantizeLinear", inputs, out, axis=_HEADS_AXIS), node]

    return graph.rewrite(rounded)
