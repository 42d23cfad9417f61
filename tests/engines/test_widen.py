"""A bfloat16 graph in float32: every place where a graph can name the type."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, parser

from gsx_engines.lowering.widen import in_float32

MODEL = """
<ir_version: 10, opset_import: ["": 21, "test": 1]>
g (bfloat16[N] x, bool[1] yes) => (bfloat16[N] y, float[N] z)
{
    scaled = Mul (x, weight)
    twice = test.Twice (scaled)
    less = Sub (twice, two)
    y = If (yes) <
        then_branch = a () => (bfloat16[N] first) { half = Cast <to = 16> (less) first = Identity (half) },
        else_branch = b () => (bfloat16[N] second) { second = Identity (twice) }
    >
    z = Cast <to = 1> (y)
}
<domain: "test", opset_import: ["": 21]>
Twice (a) => (b)
{
    one = Constant <value_float: float = 1.0> ()
    narrow = Cast <to = 16> (one)
    more = Add (a, a)
    b = Mul (more, narrow)
}
"""


def test_nothing_stays_bfloat16() -> None:
    model = parser.parse_model(MODEL)
    weight = helper.make_tensor("weight", TensorProto.BFLOAT16, [1], [1.5])
    model.graph.initializer.append(weight)
    two = helper.make_node("Constant", [], ["two"], value=helper.make_tensor("", TensorProto.BFLOAT16, [1], [2.0]))
    model.graph.node.insert(0, two)
    in_float32(model)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([1.001, -2, 1e-3], np.float32)
    for yes in (True, False):
        y, z = session.run(None, {"x": x, "yes": np.array([yes])})
        wanted = 3 * x - 2 * yes
        assert y.dtype == z.dtype == np.float32
        np.testing.assert_array_equal(y, z)
        # Of bfloat16's steps near 3, 2^-6, nothing is left.
        np.testing.assert_allclose(y, wanted, atol=1e-6)
    assert [tensor.data_type for tensor in model.graph.initializer] == [TensorProto.BFLOAT16], "stored as they were"
    assert numpy_helper.to_array(model.graph.initializer[0]).astype(np.float32) == 1.5
