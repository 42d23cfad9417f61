"""Rewrites of lowered graphs, on graphs of a few nodes: what they change, what they keep, and that results stay.

And on whole graphs: the passes count, and a graph with another layout is refused with an error that names pass and
node, while our own mistakes are raised as they are.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.building import build as building
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.errors import BundleError
from gsx_engines.lowering import onnxruntime, tensorrt
from gsx_engines.lowering.for_onnxruntime.trim import (
    add_rows,
    drop_flat_reshapes,
    keep_axis,
    sink,
    spread_columns,
)
from gsx_engines.lowering.passes import of_any, run_passes
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_plugins.graph import Graph, LayoutError

WIDTH = 4
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 3, WIDTH)).astype(np.float32)


def graph_of(
    nodes: list[onnx.NodeProto], inputs: list[str], output: str, constants: dict[str, np.ndarray] | None = None
) -> Graph:
    """Make a graph. Inputs are floats [any, WIDTH], except `asked`, one bool."""
    kinds = {"asked": (TensorProto.BOOL, [])}
    values = [helper.make_tensor_value_info(n, *kinds.get(n, (TensorProto.FLOAT, [None, WIDTH]))) for n in inputs]
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    return Graph(helper.make_graph(nodes, "graph", values, [out], tensors))


def run(graph: Graph, **feeds: np.ndarray) -> np.ndarray:
    graph.store()
    model = helper.make_model(graph.proto, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, feeds)[0]
    return out


def branches(then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto]) -> onnx.NodeProto:
    def part(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, "branch", [], [out])

    return helper.make_node("If", ["asked"], ["out"], then_branch=part(then), else_branch=part(otherwise))


def test_what_one_branch_reads_moves_into_it() -> None:
    """`a` and `b` move; `both` is read by both branches, `c` also by a later node."""
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Abs", ["a"], ["b"]),
        helper.make_node("Exp", ["x"], ["both"]),
        helper.make_node("Sqrt", ["both"], ["c"]),
        branches([helper.make_node("Sum", ["b", "both", "c"], ["t"])], [helper.make_node("Identity", ["both"], ["e"])]),
        helper.make_node("Mul", ["out", "c"], ["end"]),
    ]
    graph = graph_of(nodes, ["x", "asked"], "end")
    before = [run(graph, x=X, asked=np.array(asked)) for asked in (True, False)]
    assert sink(graph) == 2
    assert [node.op_type for node in graph.nodes] == ["Exp", "Sqrt", "If", "Mul"]
    for expected, asked in zip(before, (True, False), strict=True):
        np.testing.assert_array_equal(run(graph, x=X, asked=np.array(asked)), expected)
    assert sink(graph) == 0


def test_an_if_moves_with_what_moved_into_it() -> None:
    inner = branches([helper.make_node("Neg", ["a"], ["i"])], [helper.make_node("Identity", ["x"], ["j"])])
    inner.output[0] = "inner"
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        inner,
        branches([helper.make_node("Exp", ["inner"], ["t"])], [helper.make_node("Identity", ["x"], ["e"])]),
    ]
    graph = graph_of(nodes, ["x", "asked"], "out")
    before = run(graph, x=X, asked=np.array(True))
    assert sink(graph) == 2
    assert [node.op_type for node in graph.nodes] == ["If"]
    np.testing.assert_array_equal(run(graph, x=X, asked=np.array(True)), before)


def test_products_with_one_column() -> None:
    """And only those."""
    column, matrix = RNG.standard_normal((WIDTH, 1)), RNG.standard_normal((WIDTH, WIDTH))
    nodes = [
        helper.make_node("MatMul", ["x", "column"], ["gate"]),
        helper.make_node("MatMul", ["x", "matrix"], ["product"]),
        helper.make_node("Mul", ["gate", "product"], ["out"]),
    ]
    constants = {"column": column.astype(np.float32), "matrix": matrix.astype(np.float32)}
    graph = graph_of(nodes, ["x"], "out", constants)
    before = run(graph, x=X)
    assert spread_columns(graph) == 1
    np.testing.assert_allclose(run(graph, x=X), before, rtol=1e-5)  # float32's own rounding
    assert spread_columns(graph) == 0


def test_kept_rows_are_added() -> None:
    """With a gate, by a product; with ones, without; reshapes of a flat index are dropped."""
    index, gate = np.array([0, 2]), np.array([[2.0], [-1.0]], np.float32)
    constants = {"index": index, "gate": gate, "one": np.array(1, np.float32), "flat": np.array([-1])}
    constants["shape"] = np.array([2, 1])
    for name, factor in (("gate", gate), ("ones", np.ones_like(gate))):
        nodes = [
            helper.make_node("Expand", ["one", "shape"], ["ones"]),
            helper.make_node("Reshape", ["index", "flat"], ["again"]),
            helper.make_node("GatedScatterAdd", ["x", "y", name, "again"], ["out"], domain="gsx"),
        ]
        graph = graph_of(nodes, ["x", "y"], "out", constants)
        assert add_rows(graph) == 1
        assert drop_flat_reshapes(graph, ["index"]) == 1
        assert Counter(node.op_type for node in graph.nodes)["Mul"] == (name == "gate")
        expected = X.copy()
        expected[index] += factor * Y[:2]
        np.testing.assert_array_equal(run(graph, x=X, y=Y[:2]), expected)


def test_states_keep_the_axis_of_the_sequence() -> None:
    """Unless a node in between depends on their shape."""
    constants = {"axis": np.array([0]), "shape": np.array([1, -1, WIDTH]), "heads": np.array([-1, 2, 2])}
    for looks in (False, True):
        nodes = [
            helper.make_node("Sigmoid", ["x"], ["a"]),
            helper.make_node("Reshape", ["a", "heads"], ["h"]) if looks else helper.make_node("Neg", ["y"], ["h"]),
            helper.make_node("Unsqueeze", ["a", "axis"], ["query"]),
            helper.make_node("Mul", ["a", "x"], ["last"]),
            helper.make_node("Reshape", ["last", "shape"], ["shaped"]),
            helper.make_node("Identity", ["shaped"], ["out"]),
        ]
        graph = graph_of(nodes, ["x", "y"], "out", constants)
        before = run(graph, x=X, y=Y)
        assert keep_axis(graph, "x", "last") == (0 if looks else 2)
        np.testing.assert_array_equal(run(graph, x=X, y=Y), before)


LAYERS = 3  # of the tiny model


def portable(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(str(bundle.graph_path("model")), load_external_data=False)


def for_onnxruntime(bundle: Bundle, model: onnx.ModelProto) -> onnxruntime.Lowered:
    return onnxruntime.lower(model, bundle.manifest, range(LAYERS))


def for_tensorrt(bundle: Bundle, model: onnx.ModelProto) -> tensorrt.Lowered:
    return tensorrt.lower(model, bundle.manifest, capacity=32, rows=16, plugins=())


def test_how_often_each_pass_applied(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    counts = for_onnxruntime(bundle, portable(bundle)).counts
    names = [one.__name__ for one in onnxruntime.BODY_PASSES]
    assert list(counts) == list(dict.fromkeys(names)), "in the order in which they run"
    expected = {
        "fuse_products": 0,
        "unsigned_codes": 0,
        "give_state": 1,
        "mask_by_place": 1,
        "write_in_place": 2 * LAYERS,
        "attend_kept_rows": LAYERS,
        "attend_kept_rows_of_steps": 0,
        "attend_and_append": 0,
        "store_codes": 0,
        "wrap_branches": 2 * LAYERS,
        "decide": 2 * LAYERS,
        "add_rows": 2 * LAYERS,
        "keep_sequence_axis": 0,
        "drop_defaults": 1,
    }
    assert {name: counts[name] for name in expected} == expected
    counts = for_tensorrt(bundle, portable(bundle)).counts
    assert list(counts) == [one.__name__ for one in tensorrt.PASSES]
    expected = {
        "write_cache_in_place": 2 * LAYERS,
        "ask_for_columns": 1,
        "report_kept": 2 * LAYERS,
        "mask_choices": 2 * LAYERS,
        "add_rows": 2 * LAYERS,
        "attend_kept_rows": LAYERS,
        "attend": 0,
        "count_on_host": 0,
        "dequantize_constants": 0,
        "speak_float32": 0,
    }
    assert {name: counts[name] for name in expected} == expected


def turn_appending_round(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Concat" and node.output[0].startswith("present."):
            node.input[:] = node.input[::-1]


def split_heads_otherwise(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.op_type = node.op_type.replace("Transpose", "Identity")


def give_attention_less(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "GatheredAttention":
            del node.input[-1]


def leave_the_head_out(model: onnx.ModelProto) -> None:
    logits = next(node for node in model.graph.node if "logits" in node.output)
    model.graph.node.remove(logits)


@pytest.mark.parametrize(
    ("change", "runtime", "message"),
    [
        (split_heads_otherwise, for_onnxruntime, r"pass write_in_place, node \S+ \(Identity\): expected Transpose"),
        (turn_appending_round, for_tensorrt, r"pass write_cache_in_place, the cache: expected 6 Concat .*, found 0"),
        (give_attention_less, for_onnxruntime, r"pass attend_kept_rows, node 'layers.0.*: expected 5 inputs, found 4"),
        (give_attention_less, for_tensorrt, r"pass attend_kept_rows, node 'layers.0.*: expected 5 inputs, found 4"),
        (leave_the_head_out, for_tensorrt, r"pass ask_for_columns, value 'logits': expected .*, found nothing"),
    ],
)
def test_another_layout_is_refused_by_pass_and_node(
    tiny_bundle: Path,
    change: Callable[[onnx.ModelProto], None],
    runtime: Callable[[Bundle, onnx.ModelProto], object],
    message: str,
) -> None:
    bundle = open_bundle(tiny_bundle)
    model = portable(bundle)
    change(model)
    with pytest.raises(LayoutError, match=message):
        runtime(bundle, model)


def test_our_own_mistakes_stay_what_they_are(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the runner nor the builder reports an exception in a pass as a fault of the user's bundle."""

    def mistaken(graph: Graph) -> int:
        return len({}["no such key"])

    with pytest.raises(KeyError):
        run_passes(graph_of([helper.make_node("Neg", ["x"], ["y"])], ["x"], "y"), [of_any(mistaken)], None)
    bundle = open_bundle(tiny_bundle)
    monkeypatch.setattr(onnxruntime, "BODY_PASSES", (of_any(mistaken),))
    with pytest.raises(KeyError):
        OnnxRuntimeStage(bundle).new_memory(1, 16)
    monkeypatch.setattr(tensorrt, "PASSES", (of_any(mistaken),))
    with pytest.raises(KeyError):
        building._lower(bundle, "model", portable(bundle), 32, "in-place", building.one_profile(32, 1), None)


def test_the_builder_reports_the_error_in_four_parts(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    model = portable(bundle)
    turn_appending_round(model)
    with pytest.raises(BundleError, match=r"(?s)not laid out as .*pass write_cache_in_place.*gsx export") as caught:
        building._lower(bundle, "model", model, 32, "in-place", building.one_profile(32, 1), None)
    error = caught.value
    assert None not in (error.what, error.expected, error.found, error.todo)
    assert str(bundle.graph_path("model")) in error.what


def test_another_layout_is_refused_without_asserts_too(tiny_bundle: Path) -> None:
    """`python -O` removes asserts; checks of a file do not use them."""
    code = f"""
import sys
import onnx
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.lowering import onnxruntime
from gsx_plugins.graph import LayoutError
assert False, "asserts are left out"
bundle = open_bundle({str(tiny_bundle)!r})
model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
for node in model.graph.node:
    node.op_type = node.op_type.replace("Transpose", "Identity")
try:
    onnxruntime.lower(model, bundle.manifest, range({LAYERS}))
except LayoutError as error:
    sys.exit(f"refused: {{error}}")
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert "refused: pass write_in_place" in done.stderr
