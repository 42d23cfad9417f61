"""What a call must do, counted from a bundle's graph: the time of a step follows the bytes that it reads, the time of a
long prompt the floating-point operations.

`StepBytes` are of weights alone: K and V depend on the length of the text, and for short texts they are small against
the weights. `Work` counts both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.words import BRANCHES

_BRANCH_WEIGHTS = {"attn": ("self_attn.q_proj.", "self_attn.o_proj.", "self_attn.gate_proj."), "mlp": ("mlp.",)}
# Read for every token under the K/V policy `compute`; under the others only when the branch runs.
_KV_WEIGHTS = ("self_attn.k_proj.", "self_attn.v_proj.")
_SCALES = ("_scale", "_zero_point")
# K and V are float32 in the caches of a CPU, whatever the graph's precision.
_KV_BYTES = 4


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
    return StepBytes(*_by_branch(bundle, _weights(bundle), _size))


@dataclass(frozen=True)
class Work:
    """What the calls of a bundle cost: bytes that a step reads, floating-point operations of a prompt.

    Args:
        weights: bytes of the weights.
        products: [L, 2] float64, multiplications for a row of a branch; other_products: those for every row outside
            the branches that may be skipped, without the head; head_products: those for a row of the head.
        key_bytes: bytes of K and V that attention reads in a layer, for each token of a sequence.
        attention_products: multiplications for a kept row and each token that it sees.
    """

    weights: StepBytes
    products: np.ndarray
    other_products: float
    head_products: float
    key_bytes: float
    attention_products: float

    def step_bytes(self, rows: np.ndarray, keys: float) -> float:
        """Bytes that one step of a batch reads.

        Args:
            rows: [L, 2], rows that each branch ran on; a branch's weights are read if there is any.
            keys: tokens of a sequence that attention sees.
        """
        read = float(self.weights.branches[rows > 0].sum()) + self.weights.rest
        return read + float(rows[:, 0].sum()) * keys * self.key_bytes

    def prompt_flops(self, rows: np.ndarray, batch: int, tokens: int) -> float:
        """Floating-point operations of a call with prompts, of which only the last tokens reach the head.

        Args:
            rows: [L, 2], rows that each branch ran on.
            tokens: of each prompt.
        """
        seen = (tokens + 1) / 2  # on average: attention is causal
        multiplied = float((rows * self.products).sum()) + batch * (tokens * self.other_products + self.head_products)
        return 2 * (multiplied + float(rows[:, 0].sum()) * seen * self.attention_products)


def work_of(bundle: Bundle) -> Work:
    """Count the work of `model.onnx`'s calls."""
    weights, shape = _weights(bundle), bundle.manifest.decoder
    products, rest = _by_branch(bundle, weights, _products)
    head = float(shape.vocab_size * shape.hidden_size)
    stored = 1 if bundle.manifest.kv_cache is not None else _KV_BYTES
    return Work(
        weights=StepBytes(*_by_branch(bundle, weights, _size)),
        products=products,
        other_products=rest - head,
        head_products=head,
        key_bytes=2.0 * stored * shape.num_kv_heads * shape.head_dim,
        attention_products=2.0 * shape.num_heads * shape.head_dim,
    )


def _weights(bundle: Bundle) -> list[onnx.TensorProto]:
    """The weights of `model.onnx` of which all is read for every token: without an embedding that is no head too."""
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    others = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input}
    return [tensor for tensor in model.graph.initializer if tensor.name in others or tensor.name not in gathered]


def _by_branch(
    bundle: Bundle, weights: Sequence[onnx.TensorProto], count: Callable[[onnx.TensorProto], float]
) -> tuple[np.ndarray, float]:
    """A count of each branch's weights, [L, 2], and of all others."""
    branches = np.zeros((bundle.manifest.decoder.num_layers, len(BRANCHES)))
    loops = bundle.manifest.decoder.loops
    for layer in range(len(branches)):
        stored = layer if loops is None else loops.visits[layer]
        for column, branch in enumerate(BRANCHES):
            parts = _BRANCH_WEIGHTS[branch]
            if branch == "attn" and bundle.manifest.kv_policy != "compute":
                parts += _KV_WEIGHTS
            prefixes = tuple(f"layers.{stored}.{part}" for part in parts)
            branches[layer, column] = sum(count(tensor) for tensor in weights if tensor.name.startswith(prefixes))
    # A loop reads the weights of its layers again, those outside branches too.
    again = [] if loops is None else [f"layers.{loops.visits[visit]}." for visit in loops.optional]
    read = sum(count(tensor) * (1 + sum(map(tensor.name.startswith, again))) for tensor in weights)
    return branches, float(read - branches.sum())


def _size(tensor: onnx.TensorProto) -> float:
    half = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)  # two in a byte
    return math.prod(tensor.dims) * (0.5 if half else helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _products(tensor: onnx.TensorProto) -> float:
    """Multiplications for a row: one for each element of a matrix, but not of its scales."""
    return 0.0 if len(tensor.dims) < 2 or tensor.name.endswith(_SCALES) else float(math.prod(tensor.dims))
