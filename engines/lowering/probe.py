"""Whether this ONNX Runtime has the kernels that the lowering needs: a small model is run and compared."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from engines.lowering.onnxruntime import CONTRIB, MASKED, OPSET


@functools.cache
def is_supported(head_dim: int) -> bool:
    """Whether this ONNX Runtime has the form of GroupQueryAttention that the lowering needs.

    It is run once for each head size (which must be a multiple of 8 in ONNX Runtime 1.31) and compared.
    """
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((1, 1, 4, head_dim), np.float32) for _ in range(2))
    query = rng.standard_normal((1, 2, 2 * head_dim), np.float32)
    bias = np.where(np.array([[1, 0, 0], [1, 1, 0]], bool), 0, MASKED).astype(np.float32)[None, None]
    names = {"query": query, "key": key, "value": value, "bias": bias}
    constants = [
        numpy_helper.from_array(np.zeros((1, 0, head_dim), np.float32), "empty"),
        numpy_helper.from_array(np.array([2], np.int32), "last"),
        numpy_helper.from_array(np.array(3, np.int32), "total"),
    ]
    inputs = ["query", "empty", "empty", "key", "value", "last", "total", "", "", "", "bias"]
    heads = {"num_heads": 2, "kv_num_heads": 1}
    node = helper.make_node("GroupQueryAttention", inputs, ["out", "k", "v"], domain=CONTRIB, **heads)
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in names.items()}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("out", "k", "v")]
    model = helper.make_model(
        helper.make_graph([node], "probe", list(values.values()), outputs, initializer=constants),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=11,
    )
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(["out"], names)[0]
    except Exception:  # any refusal means that this version does not have the form
        return False
    queries = query.reshape(2, 2, head_dim).transpose(1, 0, 2)
    scores = queries @ key[0, 0, :3].T / np.sqrt(head_dim) + bias[0, 0]
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = (weights / weights.sum(axis=-1, keepdims=True)) @ value[0, 0, :3]
    return bool(np.abs(found.reshape(2, 2, head_dim) - expected.transpose(1, 0, 2)).max() < 1e-5)
