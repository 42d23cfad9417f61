"""What TensorRT-RTX's own ONNX parser makes of the function bodies, without a GPU and without plugins."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gsx_plugins.registry import OPS
from tests.plugins.test_ops import one_node_model

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")

ATTRIBUTES = {
    "GatheredAttention": {"num_heads": 4},
    "FullAttention": {"num_heads": 4},
    "RoutedExperts": {"top_k": 2, "normalized": 1},
}
# Bodies that the parser refuses, and the op it stops at: there the plugin is used (docs/design.md, section 4).
REFUSED = {"ThresholdGather": "NonZero", "RoutedExperts": "NonZero"}


def model_of(name: str) -> onnx.ModelProto:
    """A model of one node; K of TopKGather comes from a shape, as TensorRT needs it on the host.

    (With K as a tensor whose value only the device knows, the parser of TensorRT-RTX 1.7.1 crashes the process.)
    """
    model = one_node_model(name, **ATTRIBUTES.get(name, {}))
    if name == "TopKGather":
        kept = [value for value in model.graph.input if value.name != "k"]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), "two"))
        model.graph.node.insert(0, helper.make_node("Div", ["tokens", "two"], ["k"], name="k"))
        model.graph.node.insert(0, helper.make_node("Shape", ["score"], ["tokens"], name="tokens"))
    return model


@pytest.mark.parametrize("name", OPS)
def test_body_is_imported_or_refused_by_name(name: str) -> None:
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network()
    parser = rtx.OnnxParser(network, logger)
    parsed = parser.parse(model_of(name).SerializeToString())
    errors = " ".join(parser.get_error(n).desc() for n in range(parser.num_errors))
    if name in REFUSED:
        assert not parsed
        assert REFUSED[name] in errors
    else:
        assert parsed, errors
        assert network.num_layers > 0
