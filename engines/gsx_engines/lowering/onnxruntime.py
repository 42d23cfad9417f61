"""The forms that ONNX Runtime runs fastest on a CPU: K/V in place, skipped branches not entered.

There are two forms: several tokens of one sequence, and one token of each of several sequences (a step of a batch).

What differs from the portable graph (all measured, benchmarks/RESULTS.md; the passes are in `for_onnxruntime/`):

- the cache is a buffer of fixed capacity per layer; this call's K and V are written into it, and nothing is copied,
  since input and outputs are bound to the same memory;
- attention is the contrib op GroupQueryAttention, which reads the buffer up to the current length, where ONNX's
  Attention costs the whole capacity. Attention over all rows takes Q, K and V as one product (`packed.py`), rotates
  them (`rotary.py`), and appends K and V itself. Under a gate, TensorScatter does
  that for all tokens, and the kept rows attend with an empty new key and with their rows of the mask as a bias: the
  op's own mask is causal from the end, which allows at least what a kept row may see;
- K and V may be 8-bit codes (`kv_cache.py`), which the op reads and writes itself, with a scale for each channel;
- routed experts are constants of their own, each inside an `If` (`experts.py`);
- products in 8 bits are the contrib ops that have fast kernels (`quantized.py`);
- the nodes of a branch, and everything that only the branch reads, are inside `If`, which is not entered when no row is
  kept;
- the decisions of all branches are made together as far as possible (`decisions.py`), and small nodes are removed or
  merged (`trim.py`, `dots.py`), since a single step pays for each of them;
- where a rule chooses for whole calls (sets of layers), an entered branch is what it is in a dense model: nothing is
  gathered or put back (`whole_calls.py`);
- final norm and head are a model of their own. It runs only on the requested columns (in generation, the last one), and
  the two halves of a split decoder share it, so that its weights are in memory once; a draft that chooses among few
  tokens has one of its own.

In a step every row is the last one of its sequence, so the op's own mask by length, and by window, is the whole mask.
The kept rows' queries are at the positions of their sequences; the other sequences attend to one column, and their
result is not read.

Where a skipped token leaves no K and V and must not be seen, each layer has its own mask, found in the written buffer.

Limits: no padding, only float32; in steps no mask per layer, and only threshold selection, since rank selection
compares the tokens of a whole call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import helper

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.lowering.for_onnxruntime.attention import (
    add_biases,
    attend_and_append,
    attend_kept_rows,
    attend_kept_rows_of_steps,
)
from gsx_engines.lowering.for_onnxruntime.cache import (
    forget_loops_before,
    name_capacity,
    read_live_keys,
    store_codes,
    write_each_visit,
    write_in_place,
)
from gsx_engines.lowering.for_onnxruntime.decisions import decide
from gsx_engines.lowering.for_onnxruntime.dots import dot_rows
from gsx_engines.lowering.for_onnxruntime.experts import spread_experts
from gsx_engines.lowering.for_onnxruntime.head import give_state, scatter_logits, take_state
from gsx_engines.lowering.for_onnxruntime.lengths import count_from_total_length, mask_by_place
from gsx_engines.lowering.for_onnxruntime.packed import pack_products
from gsx_engines.lowering.for_onnxruntime.quantized import fuse_products, shared_table, unsigned_codes, weights_inside
from gsx_engines.lowering.for_onnxruntime.regions import wrap_branches
from gsx_engines.lowering.for_onnxruntime.rotary import rotate_in_attention, tables_of
from gsx_engines.lowering.for_onnxruntime.task import CONTRIB, OPSET, Task, appended, gates_attention
from gsx_engines.lowering.for_onnxruntime.trim import (
    add_rows,
    drop_index_reshapes,
    keep_sequence_axis,
    sink,
    spread_columns,
)
from gsx_engines.lowering.for_onnxruntime.whole_calls import run_all_rows
from gsx_engines.lowering.passes import Pass, of_any, run_passes
from gsx_plugins.domain import DOMAIN, OPSET_VERSION
from gsx_plugins.graph import Graph

# The passes over the portable graph, in order.
BODY_PASSES: tuple[Pass[Task], ...] = (
    of_any(fuse_products),
    of_any(unsigned_codes),
    give_state,
    count_from_total_length,
    mask_by_place,
    write_each_visit,
    write_in_place,
    forget_loops_before,
    attend_kept_rows,
    attend_kept_rows_of_steps,
    read_live_keys,
    attend_and_append,
    add_biases,
    name_capacity,
    store_codes,
    wrap_branches,
    decide,
    of_any(add_rows),
    drop_index_reshapes,
    of_any(Graph.drop_unread),
    of_any(spread_columns),
    of_any(Graph.drop_defaults),  # only plain inputs can be bound to memory
    of_any(Graph.drop_unread),
    of_any(sink),
    run_all_rows,
    of_any(spread_experts),
    of_any(dot_rows),
    of_any(pack_products),
    rotate_in_attention,
    keep_sequence_axis,
    of_any(weights_inside),
)
# The passes that make the head's model.
HEAD_PASSES: tuple[Pass[Task], ...] = (take_state, scatter_logits, of_any(shared_table))


def cache_outputs(manifest: Manifest, cache: int, kv: str) -> tuple[str, ...]:
    """Outputs of the lowered graph that must be bound to the memory of a cache's K or V input."""
    shape = manifest.decoder
    layers = [layer for layer in range(shape.num_layers) if shape.cache_of(layer) == cache]
    gated = [appended(layer, kv) for layer in layers if gates_attention(manifest, layer)]
    return (*gated, *(shape.present_of(layer, kv) for layer in layers))


@dataclass(frozen=True)
class Lowered:
    """A graph as two models: the layers, and what comes after them.

    Args:
        body: has the inputs of the portable graph, but instead of `attention_mask` it has `total_length` [B] int64, the
            number of tokens in the cache after the call: nothing is padded. Cache inputs and outputs have the axis
            `capacity`; `cache_outputs` returns the outputs that share the memory of an input. Instead of logits it
            returns `state` [B, S, H], of its last layer, and with gates `kept`: [P] int64, the number of rows kept by
            each gated branch, or in steps [P x B] bool, which rows.
        head: `state` [1, any, H] -> `logits` [1, any, V].
        tables: `position_ids` [1, N] int64 -> the rotary tables that the body reads as further inputs, where attention
            rotates itself (`rotary.TABLE_PREFIX`), for every position of the cache; None if it reads none.
        counts: how often each pass applied to the body.
    """

    body: onnx.ModelProto
    head: onnx.ModelProto
    tables: onnx.ModelProto | None
    counts: Mapping[str, int]


def lower(portable: onnx.ModelProto, manifest: Manifest, layers: range, *, steps: bool = False) -> Lowered:
    """The lowered form of a portable graph (its weights stay external).

    Args:
        layers: the layers in the graph.
        steps: make the form for one token of each of B sequences, instead of S tokens of one sequence.
    Raises:
        LayoutError: the graph does not have the layout of this version's exporter.
    """
    task = Task(manifest, layers, steps)
    body, head = _model_of(portable.graph, portable), _model_of(portable.graph, portable)
    run_passes(Graph(head.graph), HEAD_PASSES, task)
    counts = run_passes(Graph(body.graph), BODY_PASSES, task)
    tables = tables_of(portable.graph, body.graph)
    return Lowered(body, head, None if tables is None else _model_of(tables, portable), counts)


def _model_of(graph: onnx.GraphProto, portable: onnx.ModelProto) -> onnx.ModelProto:
    """A model of a graph, with the ops that the lowered forms use."""
    model = onnx.ModelProto()
    model.CopyFrom(portable)
    model.graph.CopyFrom(graph)
    del model.opset_import[:]
    opsets = (("", OPSET), (DOMAIN, OPSET_VERSION), (CONTRIB, 1))
    model.opset_import.extend(helper.make_opsetid(domain, number) for domain, number in opsets)
    for function in model.functions:
        function.opset_import[0].version = OPSET
    return model
