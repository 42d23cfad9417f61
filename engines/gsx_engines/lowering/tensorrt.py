"""The form of a graph that TensorRT builds an engine from. The file in the bundle is unchanged.

With K and V in place, which is what gsx runs, the form differs from the portable graph:

- the cache is a buffer of fixed capacity per layer. `TensorScatter` writes this call's K and V into it, which TensorRT
  imports as its in-place cache update: `present.*` shares the memory of `past_key_values.*`, and nothing is copied;
- the axis `total` becomes `window`: how many columns of the cache attention reads, at least those that are filled;
  columns after these are 0 in `attention_mask`. A separate input, `write_at [B]`, has the position of the call's tokens
  for each sequence. So sequences have their own lengths without padding, a step of decoding keeps its shapes while the
  cache grows, and one CUDA graph serves many steps;
- the head runs on the tokens that `logits_at [B, M]` names, numbered over the flattened batch;
- `logits` and the exit state (`exit_hidden`, `exit_key`, `exit_value`) are float32 outside, in every precision;
- `kept [n]` has the number of rows that each gated branch ran on;
- `thresholds` and `budget` lose their default value, so that they stay inputs;
- attention is written out for TensorRT's `Attention` (one output, explicit mask);
- the product of a vector gate multiplies 16-bit numbers and codes as they are stored, in float32;
- codes of an embedding or a gate go through a DequantizeLinear, for an embedding before its rows are read: TensorRT
  takes 8-bit constants nowhere else;
- zero-points of weights in blocks become a small product of their own, since TensorRT takes only zero-points of 0;
- in a looped model, products of the same value at every visit of a layer are one product with joined weights, which
  are stored once;
- routed experts are batched products of the experts that a call may use;
- an op without a plugin is rewritten; see `Form`.

The passes are in `for_tensorrt/`.

In a step, for calls of one size, all sizes are numbers: the window is the whole buffer, and all tokens get logits. The
product of a scalar gate is a sum. With the plugin library, products of branches and attention are plugins
(`predicated.py`, `step_attention.py`). The likeliest tokens are outputs of their own (`likely_ids`, `likely_logits`,
`likely_total`).

With K and V that grow, for other programs, the first five do not apply: the engine has the portable graph's inputs and
outputs, `past_key_values.*` and `present.*` with the call's columns after it.

Without a plugin for `ThresholdGather` the selection becomes a mask: every row goes through every branch, and a skipped
row keeps its residual. The results are the same, but nothing is saved. `TopKGather` has a body that TensorRT imports if
the host knows `k [1]`: it becomes an input instead of `budget`, and the runner computes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx

from gsx_engines.bundle.engine_entry import KvLayout
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering.for_tensorrt.attention import attend, attend_kept_rows, rotate_by_head
from gsx_engines.lowering.for_tensorrt.choices import add_rows, count_on_host, mask_choices
from gsx_engines.lowering.for_tensorrt.constants import dequantize_constants
from gsx_engines.lowering.for_tensorrt.experts import run_experts
from gsx_engines.lowering.for_tensorrt.gates import multiply_gates
from gsx_engines.lowering.for_tensorrt.inputs import (
    ask_for_columns,
    fix_sizes,
    place_call,
    report_kept,
    speak_float32,
    write_cache_in_place,
)
from gsx_engines.lowering.for_tensorrt.likeliest import offer_likeliest
from gsx_engines.lowering.for_tensorrt.predicated import predicate_branches
from gsx_engines.lowering.for_tensorrt.scalar_gates import sum_scalar_gates
from gsx_engines.lowering.for_tensorrt.shared_weights import join_shared_weights
from gsx_engines.lowering.for_tensorrt.step_attention import attend_in_steps
from gsx_engines.lowering.for_tensorrt.task import Form, Task
from gsx_engines.lowering.for_tensorrt.whole_calls import run_whole_calls
from gsx_engines.lowering.for_tensorrt.zero_points import without_zero_points
from gsx_engines.lowering.passes import Pass, of_any, run_passes
from gsx_plugins.domain import DOMAIN
from gsx_plugins.graph import Graph

OPSET = 24  # TensorScatter
# The passes over the portable graph, in order.
PASSES: tuple[Pass[Task], ...] = (
    of_any(Graph.drop_defaults),  # an initializer with an input's name would turn the input into a constant
    place_call,
    write_cache_in_place,
    ask_for_columns,
    run_whole_calls,
    report_kept,
    mask_choices,
    add_rows,
    attend_in_steps,
    multiply_gates,
    predicate_branches,
    sum_scalar_gates,
    attend_kept_rows,
    attend,
    rotate_by_head,
    count_on_host,
    run_experts,
    join_shared_weights,
    dequantize_constants,
    without_zero_points,
    speak_float32,
    offer_likeliest,
    fix_sizes,
    of_any(Graph.drop_unread),
)


@dataclass(frozen=True)
class Lowered:
    """A graph for TensorRT.

    Args:
        model: the model; its weights stay external, in the bundle's file.
        forms: the form that each op of domain gsx in the portable graph took.
        counts: how often each pass applied.
        joined: constants that must be written beside the weights (`write_joined`) -> their parts.
    """

    model: onnx.ModelProto
    forms: Mapping[str, Form]
    counts: Mapping[str, int]
    joined: Mapping[str, Sequence[onnx.TensorProto]]


def lower(
    portable: onnx.ModelProto,
    manifest: Manifest,
    *,
    capacity: int,
    rows: int,
    plugins: Collection[str],
    kv_layout: KvLayout = "in-place",
    step: tuple[int, int] | None = None,
) -> Lowered:
    """The form of a bundle's graph that TensorRT builds an engine from.

    Args:
        portable: `model.onnx`, `draft.onnx` or `verify.onnx`, without its weights.
        capacity, rows, plugins, kv_layout, step: as in `Task`.
    Raises:
        LayoutError: the graph does not have the layout of this version's exporter.
    """
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    task = Task(manifest, capacity, rows, frozenset(plugins), kv_layout, step)
    counts = run_passes(Graph(model.graph), PASSES, task)
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    functions = [function for function in model.functions if function.name in used]
    del model.functions[:]
    model.functions.extend(functions)
    for opsets in (model.opset_import, *(function.opset_import for function in functions)):
        for entry in opsets:
            if not entry.domain:
                entry.version = OPSET
    return Lowered(model, task.forms, counts, task.joined)
