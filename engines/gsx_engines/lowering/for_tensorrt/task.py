"""Shared by all passes for TensorRT: the task, and names of values that a caller sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import onnx
from onnx import TensorProto

from gsx_engines.bundle.engine_entry import KvLayout
from gsx_engines.bundle.manifest import DecoderShape, Manifest

# The largest k that TensorRT's TopK takes.
MAX_TOPK = 3840
# The form of an op of domain gsx in an engine. "plugin"; "predicated": plugins for a few rows, which read the decision
# on the GPU; "body": its function body; "rows": standard ops on as many rows as the host says; "mask" and "all":
# standard ops that run on all rows (the results are right, but nothing is saved).
Form = Literal["plugin", "predicated", "body", "rows", "mask", "all"]
# Inputs that only the lowered graph has, and its outputs of kept rows: by branch, and by token.
WRITE_AT, LOGITS_AT, K, KEPT, KEPT_BY_TOKEN = "write_at", "logits_at", "k", "kept", "kept_by_token"
# Outputs of a step: the likeliest tokens, their logits, and a sum over all.
LIKELY_IDS, LIKELY_LOGITS, LIKELY_TOTAL = "likely_ids", "likely_logits", "likely_total"
# Inputs whose size is the number of rows of a branch, by layer and branch: `run.3.mlp`.
RUN = "run."
# Names of dynamic axes.
WINDOW, LOGITS_COLUMNS = "window", "logits_columns"
FLOAT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Task:
    """A graph to be lowered, and what its passes record.

    Args:
        capacity: columns of the K/V buffers, fixed in the engine; unused if K and V grow.
        rows: largest number of tokens of a call, over all sequences.
        plugins: ops of domain gsx that have a plugin.
        kv_layout: how K and V are stored.
        step: sequences and tokens of each, of engines for calls of one size; else None.
        forms: the form that each op of domain gsx in the portable graph took.
        masks: the numbers of a choice that became a mask -> which rows are kept, [N, 1] bool.
        whole_rows: the numbers of the rows that the host decided on (`whole_calls.py`) -> how many these are, n [1].
        made: nodes that several layers read, made for the first of them.
        joined: constants whose data must be written (`shared_weights.py`) -> their parts, side by side.
        products_of_kept: names of the products of rows that such a choice keeps -> which rows these are, the same.
    """

    manifest: Manifest
    capacity: int
    rows: int
    plugins: frozenset[str]
    kv_layout: KvLayout
    step: tuple[int, int] | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    products_of_kept: dict[str, str] = field(default_factory=dict)
    whole_rows: dict[str, str] = field(default_factory=dict)
    made: list[onnx.NodeProto] = field(default_factory=list)
    joined: dict[str, list[TensorProto]] = field(default_factory=dict)

    @property
    def shape(self) -> DecoderShape:
        """The decoder's shape."""
        return self.manifest.decoder

    @property
    def in_place(self) -> bool:
        """Whether K and V are written in place, which is what gsx runs."""
        return self.kv_layout != "growing"

    @property
    def width(self) -> int:
        """Width of the queries of all heads."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def float_type(self) -> int:
        """ONNX type of the graph's activations."""
        return FLOAT_TYPES[self.manifest.precision]
