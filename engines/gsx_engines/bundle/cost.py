"""Bytes of weights that a decoding step reads, counted from a bundle's graph; the time of a step follows them.

The K/V cache is left out: it depends on the length of the text, and for short texts it is small against the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.words import BRANCHES

_BRANCH_WEIGHTS = {"attn": ("self_attn.q_proj.", "self_attn.o_proj."), "mlp": ("mlp.",)}
# Read for every token under the K/V policy `compute`; under the others only when the branch runs.
_KV_WEIGHTS = ("self_attn.k_proj.", "self_attn.v_proj.")


@dataclass(frozen=True)
class StepBytes:
    """Bytes read for one token.

    Args:
        branches: [L, 2] float64, the bytes that are saved when a branch is skipped.
        rest: all other bytes: norms, gates, K and V, the head (but not the embedding, of which only a row is read).
    """

    branches: np.ndarray
    rest: float

    def share(self, run: np.ndarray) -> float:
        """Bytes of a step that runs some of the branches, [L, 2] bool, as a share of those of a full step."""
        return float((self.branches[run].sum() + self.rest) / (self.branches.sum() + self.rest))


def step_bytes(bundle: Bundle) -> StepBytes:
    """Count the bytes of the weights of `model.onnx`."""
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    sizes = {tensor.name: _size(tensor) for tensor in model.graph.initializer}
    # A tied head reads the whole embedding.
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    others = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input}
    total = sum(size for name, size in sizes.items() if name in others or name not in gathered)
    branches = np.zeros((bundle.manifest.decoder.num_layers, len(BRANCHES)))
    for layer in range(len(branches)):
        for column, branch in enumerate(BRANCHES):
            parts = _BRANCH_WEIGHTS[branch]
            if branch == "attn" and bundle.manifest.kv_policy != "compute":
                parts += _KV_WEIGHTS
            prefixes = tuple(f"layers.{layer}.{part}" for part in parts)
            branches[layer, column] = sum(size for name, size in sizes.items() if name.startswith(prefixes))
    return StepBytes(branches, float(total - branches.sum()))


def _size(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
