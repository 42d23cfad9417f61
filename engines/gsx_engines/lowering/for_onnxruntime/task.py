"""Shared by all passes for ONNX Runtime: the task, names of internal values, and the attention op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx
from onnx import helper

from gsx_engines.bundle.manifest import DecoderShape, Manifest
from gsx_engines.lowering.kv_cache import of_channels
from gsx_plugins.graph import Graph

CONTRIB = "com.microsoft"
OPSET = 24  # TensorScatter
# Added to the attention scores of columns that a row may not see; exp() of it is 0 in float32.
MASKED = -1e9
# Attributes of GroupQueryAttention over codes.
EIGHT_BITS: dict[str, int | str] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
# A further input of the lowered graph, and the output that replaces the logits: the last state.
TOTAL_LENGTH, STATE = "total_length", "state"
# Internal values: where K and V are written, the cache's last column, its length.
WRITE_AT, LAST, TOTAL = "lowered.write_at", "lowered.last_column", "lowered.total"
# Attributes of attention that say how scores are computed; the contrib op has the same.
_OF_SCORES = ("scale", "softcap")
# Constants: [0], and the axis of a cache that counts tokens, [2].
FIRST, TOKENS_AXIS = "lowered.first", "lowered.tokens_axis"


@dataclass(frozen=True)
class Task:
    """A graph to be lowered.

    Args:
        layers: the layers in the graph.
        steps: whether each row of a call is a sequence of its own, with one token; else a call is one sequence.
    """

    manifest: Manifest
    layers: range
    steps: bool

    @property
    def shape(self) -> DecoderShape:
        """The decoder's shape."""
        return self.manifest.decoder

    @cached_property
    def gated(self) -> Sequence[int]:
        """The layers whose attention runs over kept rows."""
        return [layer for layer in self.layers if gates_attention(self.manifest, layer)]

    @cached_property
    def indices(self) -> Sequence[str]:
        """The values that name the kept rows of each branch, in order."""
        places = [place for place in self.manifest.skippable_places if place[0] in self.layers]
        return [f"layers.{layer}.{branch}.index" for layer, branch in places]

    @property
    def writes_in_branch(self) -> bool:
        """Whether K and V are written where a branch runs, and a skipped one leaves the buffer as it is."""
        manifest = self.manifest
        if manifest.kv_policy == "none":
            # Where other nodes read a token's key, a skipped token overwrites what a draft may have left with zeros.
            return not manifest.hides_skipped
        # A call of one sequence that leaves a loop out: what the loop before has written is what stays.
        loops = self.shape.loops
        one_cache = loops is not None and loops.share_caches
        return one_cache and not self.steps and chooses_whole_calls(manifest)

    @property
    def first_input(self) -> str:
        """The state that enters the first layer, [N, H]."""
        return "entering" if self.layers.start else "hidden"

    @property
    def last_output(self) -> str:
        """The state that leaves the last layer, [N, H]."""
        return f"layers.{self.layers.stop - 1}.output"


def chooses_whole_calls(manifest: Manifest) -> bool:
    """Whether all tokens of a sequence run the same branches, but for those below `full_until`, which run all."""
    policy = manifest.policy
    return policy is not None and any(policy.input(name) is not None for name in ("layer_mask", "loops"))


def gates_attention(manifest: Manifest, layer: int) -> bool:
    """Whether a layer's attention runs over kept rows."""
    return (layer, "attn") in manifest.skippable_places


def appended(layer: int, kv: str) -> str:
    """Name of the cache with this call's K or V written into it, under a gate."""
    return f"appended.{layer}.{kv}"


def bias_of(mask: str) -> str:
    """Name of a mask as a float bias; `add_biases` computes it where attention reads it."""
    return f"lowered.bias.{mask}"


def layer_of(graph: Graph, attention: onnx.NodeProto) -> int:
    """The layer of an attention node, by its name."""
    parts = attention.name.split(".")
    graph.expect(parts[0] == "layers" and parts[1:2] and parts[1].isdigit(), attention, "a name `layers.NUMBER.`")
    return int(parts[1])


def attention_node(
    graph: Graph,
    task: Task,
    replaced: onnx.NodeProto,
    query: str,
    new: tuple[str, str],
    cache: tuple[str, str],
    outputs: Sequence[str],
    *,
    last: str = LAST,
    bias: str = "",
) -> onnx.NodeProto:
    """GroupQueryAttention of queries [B, K, heads x D] over a cache, to which new K and V are appended.

    Args:
        replaced: the attention node whose place it takes.
        last: the last column that each sequence sees, [B] int32.
        bias: added to the scores, where the op's own mask, causal and by the layer's window, is not that of the rows.
    """
    shape, layer = task.shape, layer_of(graph, replaced)
    inputs = [query, *new, *cache, last, TOTAL, "", "", "", bias]
    attributes: dict[str, int | float | str] = {"num_heads": shape.num_heads, "kv_num_heads": shape.num_kv_heads}
    attributes |= {one.name: one.f for one in replaced.attribute if one.name in _OF_SCORES}
    if task.manifest.kv_cache is not None:
        inputs += ["", of_channels(layer, "key"), of_channels(layer, "value")]
        attributes |= EIGHT_BITS
    while not inputs[-1]:
        inputs.pop()
    window = shape.windows[layer]
    if window is not None and not bias:
        attributes["local_window_size"] = window
    name = f"layers.{layer}.lowered.attention"
    return helper.make_node("GroupQueryAttention", inputs, list(outputs), name=name, domain=CONTRIB, **attributes)
