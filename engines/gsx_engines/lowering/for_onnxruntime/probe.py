"""Checks whether this ONNX Runtime has the kernels that the lowering needs, by running small models."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gsx_engines.lowering.for_onnxruntime.task import CONTRIB, EIGHT_BITS, MASKED, OPSET

# The value of one code: random keys and values of size 1 are within 127 of them.
_STEP = np.float32(2.0**-5)
# Largest error of the result, whose size is 1. With codes, ONNX Runtime 1.31 rounds more than necessary (seen: 0.002).
_ROUNDING = {False: 1e-5, True: 0.02}


@functools.cache
def is_supported(head_dim: int, *, eight_bits: bool = False) -> bool:
    """Whether this ONNX Runtime has the form of GroupQueryAttention that the lowering needs.

    The op is run once for each head size (which must be a multiple of 8 in ONNX Runtime 1.31) and its result compared.

    Args: eight_bits: with a cache of 8-bit codes.
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
    attributes: dict[str, int | str] = {"num_heads": 2, "kv_num_heads": 1}
    cache_type = TensorProto.FLOAT
    if eight_bits:
        # Keys and values that codes represent exactly, so that nothing is rounded.
        names |= {"key": np.clip(np.rint(key / _STEP), -127, 127), "value": np.clip(np.rint(value / _STEP), -127, 127)}
        key, value = names["key"] * _STEP, names["value"] * _STEP
        names |= {"key": names["key"].astype(np.int8), "value": names["value"].astype(np.int8)}
        constants.append(numpy_helper.from_array(np.full((1, 1, 1, head_dim), _STEP, np.float32), "scales"))
        inputs += ["", "scales", "scales"]
        attributes |= EIGHT_BITS
        cache_type = TensorProto.INT8
    node = helper.make_node("GroupQueryAttention", inputs, ["out", "k", "v"], domain=CONTRIB, **attributes)
    types = {"key": cache_type, "value": cache_type}
    values = {n: helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), a.shape) for n, a in names.items()}
    kinds = {"out": TensorProto.FLOAT, "k": cache_type, "v": cache_type}
    outputs = [helper.make_tensor_value_info(n, kind, None) for n, kind in kinds.items()]
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
    return bool(np.abs(found.reshape(2, 2, head_dim) - expected.transpose(1, 0, 2)).max() < _ROUNDING[eight_bits])


@functools.cache
def products_saturate() -> bool:
    """Whether the product of uint8 rows and int8 weights is wrong for large codes on this machine.

    On x86 CPUs with AVX2 and without VNNI, ONNX Runtime's kernel adds pairs of products in 16 bits, which saturate at
    32,767 (seen with ONNX Runtime 1.31; its own remedy, `session.x64quantprecision`, makes a DequantizeLinear of the
    graph invalid). The product of uint8 rows and uint8 weights is right on every CPU.
    """
    rows, weights = np.full((1, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    one, zero = np.float32(1), np.uint8(0)
    constants = [numpy_helper.from_array(a, n) for n, a in (("weights", weights), ("one", one), ("zero", zero))]
    node = helper.make_node("MatMulIntegerToFloat", ["rows", "weights", "one", "one", "zero"], ["out"], domain=CONTRIB)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "probe",
            [helper.make_tensor_value_info("rows", TensorProto.UINT8, rows.shape)],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            initializer=constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=11,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((session.run(["out"], {"rows": rows})[0] != 64 * 255 * 127).any())
