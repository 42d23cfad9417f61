"""Rewrites of lowered graphs, on graphs of a few nodes: what they change, what they leave, and that numbers stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.lowering.for_onnxruntime.trim import (
    add_rows,
    drop_flat_reshapes,
    sink,
    spread_columns,
)

WIDTH = 4
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 3, WIDTH)).astype(np.float32)


def graph_of(
    nodes: list[onnx.NodeProto], inputs: list[str], output: str, constants: dict[str, np.ndarray] | None = None
) -> onnx.GraphProto:
    """Float inputs [any, WIDTH], but `asked`, one bool."""
    kinds = {"asked": (TensorProto.BOOL, [])}
    values = [helper.make_tensor_value_info(n, *kinds.get(n, (TensorProto.FLOAT, [None, WIDTH]))) for n in inputs]
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    return helper.make_graph(nodes, "graph", values, [out], tensors)


def run(graph: onnx.GraphProto, **feeds: np.ndarray) -> np.ndarray:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out: np.ndarray = session.run(None, feeds)[0]
    return out


def branches(then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto]) -> onnx.NodeProto:
    def part(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, "branch", [], [out])

    return helper.make_node("If", ["asked"], ["out"], then_branch=part(then), else_branch=part(otherwise))


def test_what_one_branch_reads_moves_into_it() -> None:
    """`a` and `b` go; `both` is read by either branch, `c` by a node behind it too."""
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
    assert [node.op_type for node in graph.node] == ["Exp", "Sqrt", "If", "Mul"]
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
    assert [node.op_type for node in graph.node] == ["If"]
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
    """With a gate by a product, with ones without; what follows of a flat index goes."""
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
        assert Counter(node.op_type for node in graph.node)["Mul"] == (name == "gate")
        expected = X.copy()
        expected[index] += factor * Y[:2]
        np.testing.assert_array_equal(run(graph, x=X, y=Y[:2]), expected)


def test_states_keep_the_axis_of_the_sequence() -> None:
    """Unless something on the way looks at their shape."""
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
