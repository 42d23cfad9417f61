"""The ops against a plain NumPy reference: as torch ops, and as ONNX nodes in ONNX Runtime (through their bodies)."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gsx_plugins.domain import DOMAIN, ONNX_OPSET, OPSET_VERSION, node
from gsx_plugins.full_attention.op import full_attention
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.gathered_attention.op import gathered_attention
from gsx_plugins.registry import OPS, register_all
from gsx_plugins.routed_experts.op import routed_experts
from gsx_plugins.threshold_gather.op import threshold_gather
from gsx_plugins.topk_gather.op import topk_gather

FP32_ATOL = 2e-6  # a few roundings of float32 at values of order 1
NAN, INF = float("nan"), float("inf")
ONNX_TYPES = {"float": TensorProto.FLOAT, "T": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
# Ranks of each op's inputs and outputs, for graphs of one node.
RANKS = {
    "TopKGather": ((2, 1, 1), (2, 1, 0)),
    "ThresholdGather": ((2, 1, 0), (2, 1, 0)),
    "GatedScatterAdd": ((2, 2, 2, 1), (2,)),
    "GatheredAttention": ((2, 1, 4, 4, 4), (2,)),
    "FullAttention": ((3, 4, 4, 4), (3,)),
    "RoutedExperts": ((2, 2, 3, 3, 3), (2,)),
}


def one_node_model(name: str, **attributes: int) -> onnx.ModelProto:
    """A model of one node of an op, with its body; every axis is dynamic."""
    register_all()
    op = OPS[name]

    def values(formal: object, ranks: tuple[int, ...]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, ONNX_TYPES[kind], [f"{n}_{axis}" for axis in range(rank)])
            for (n, kind), rank in zip(formal, ranks, strict=True)
        ]

    inputs, outputs = values(op.inputs, RANKS[name][0]), values(op.outputs, RANKS[name][1])
    call = node(op, [n for n, _ in op.inputs], [n for n, _ in op.outputs], name, **attributes)
    model = helper.make_model(
        helper.make_graph([call], name, inputs, outputs),
        functions=[op.function()],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        ir_version=11,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@cache
def session(name: str, **attributes: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(one_node_model(name, **attributes).SerializeToString(), options)


def run_onnx(name: str, *arrays: np.ndarray, **attributes: int) -> list[np.ndarray]:
    feeds = dict(zip((n for n, _ in OPS[name].inputs), arrays, strict=True))
    return session(name, **attributes).run(None, feeds)


def run_torch(op: object, *arrays: np.ndarray, **attributes: int) -> list[np.ndarray]:
    out = op(*(torch.from_numpy(np.asarray(a)) for a in arrays), **attributes)
    return [o.numpy() for o in (out if isinstance(out, tuple) else (out,))]


def rows_above(score: np.ndarray, threshold: float) -> list[int]:
    return [i for i, s in enumerate(score.tolist()) if s > threshold]


def best_rows(score: np.ndarray, k: int) -> list[int]:
    lowest = float(np.finfo(np.float32).min)
    ranked = sorted(range(len(score)), key=lambda i: (-(lowest if np.isnan(score[i]) else float(score[i])), i))
    return sorted(ranked[:k])


def random_rows(n: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


SCORE_ROWS = {
    "one token": [0.5],
    "ties": [0.5, 0.7, 0.5, 0.7, 0.5],
    "a score equal to the threshold": [0.25, 0.5, 0.75],
    "NaN": [NAN, 0.6, NAN, 0.4],
    "padding and end-of-text": [-INF, -INF, 0.5, INF, 0.1],
    "all the same": [0.5] * 7,
}


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("threshold", [-INF, 0.5, 0.9, INF])
@pytest.mark.parametrize("case", SCORE_ROWS)
def test_threshold_gather(case: str, threshold: float, width: int) -> None:
    score = np.array(SCORE_ROWS[case], np.float32)
    x = random_rows(len(score), width)
    expected = rows_above(score, threshold)
    tau = np.array(threshold, np.float32)
    for rows, index, count in (
        run_torch(threshold_gather, x, score, tau),
        run_onnx("ThresholdGather", x, score, tau),
    ):
        assert index.tolist() == expected
        assert count == len(expected)
        np.testing.assert_array_equal(rows, x[expected])


@pytest.mark.parametrize("case", SCORE_ROWS)
def test_topk_gather_for_every_k(case: str) -> None:
    score = np.array(SCORE_ROWS[case], np.float32)
    x = random_rows(len(score), 5)
    for k in range(len(score) + 1):
        expected = best_rows(score, k)
        for rows, index, count in (
            run_torch(topk_gather, x, score, np.array([k])),
            run_onnx("TopKGather", x, score, np.array([k])),
        ):
            assert index.tolist() == expected
            assert count == k
            np.testing.assert_array_equal(rows, x[expected])


scores = st.lists(st.one_of(st.floats(0, 1, width=32), st.sampled_from([NAN, INF, -INF, 0.5])), min_size=1, max_size=64)


@settings(max_examples=60)
@given(values=scores, threshold=st.one_of(st.floats(0, 1, width=32), st.sampled_from([-INF, INF])), data=st.data())
def test_choices_agree_with_the_rule(values: list[float], threshold: float, data: st.DataObject) -> None:
    score = np.array(values, np.float32)
    x = random_rows(len(score), 3)
    tau = np.array(threshold, np.float32)
    assert run_onnx("ThresholdGather", x, score, tau)[1].tolist() == rows_above(score, float(tau))
    each = score[::-1].copy()
    above = [row for row, (one, limit) in enumerate(zip(score, each, strict=True)) if one > limit]
    assert run_onnx("ThresholdGather", x, score, each)[1].tolist() == above
    assert run_torch(threshold_gather, x, score, each)[1].tolist() == above
    k = data.draw(st.integers(0, len(score)))
    assert run_onnx("TopKGather", x, score, np.array([k]))[1].tolist() == best_rows(score, k)
    assert run_torch(topk_gather, x, score, np.array([k]))[1].tolist() == best_rows(score, k)


@pytest.mark.parametrize("gate_width", ["vector", "scalar"])
@pytest.mark.parametrize("kept", [[], [0], [1, 3], [0, 1, 2, 3, 4]])
def test_gated_scatter_add(kept: list[int], gate_width: str) -> None:
    residual, index = random_rows(5, 3), np.array(kept, np.int64)
    rows, gate = random_rows(len(kept), 3, 1), random_rows(len(kept), 3 if gate_width == "vector" else 1, 2)
    expected = residual.copy()
    expected[kept] += gate * rows
    for (out,) in (
        run_torch(gated_scatter_add, residual, rows, gate, index),
        run_onnx("GatedScatterAdd", residual, rows, gate, index),
    ):
        np.testing.assert_allclose(out, expected, atol=FP32_ATOL)


def attention_reference(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Plain attention in float64: query [B, heads, S, D], key and value [B, kv heads, T, D], mask [B, 1, S, T]."""
    group = query.shape[1] // key.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (key, value))
    s = query.astype(np.float64) @ k.swapaxes(2, 3) / np.sqrt(query.shape[-1])
    s = np.where(mask, s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)) @ v


@pytest.mark.parametrize("kept", [[], [0], [5], [1, 2, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("past", [0, 4])
def test_attention_of_kept_and_of_all_rows(kept: list[int], past: int) -> None:
    batch, length, heads, kv_heads, width = 2, 3, 4, 2, 8
    rng = np.random.default_rng(3)
    query = rng.standard_normal((batch, length, heads * width)).astype(np.float32)
    key, value = (rng.standard_normal((batch, kv_heads, past + length, width)).astype(np.float32) for _ in range(2))
    mask = np.tril(np.ones((length, past + length), bool), past)[None, None].repeat(batch, 0)
    mask[1, :, :, : past // 2] = False  # left padding in the second sequence
    split = query.reshape(batch, length, heads, width).swapaxes(1, 2)
    expected = attention_reference(split, key, value, mask).swapaxes(1, 2).reshape(batch * length, -1)
    index = np.array(kept, np.int64)
    rows = query.reshape(batch * length, -1)[kept]
    for (out,) in (
        run_torch(gathered_attention, rows, index, key, value, mask, num_heads=heads),
        run_onnx("GatheredAttention", rows, index, key, value, mask, num_heads=heads),
    ):
        np.testing.assert_allclose(out, expected[kept], atol=FP32_ATOL)
    for (out,) in (
        run_torch(full_attention, query, key, value, mask, num_heads=heads),
        run_onnx("FullAttention", query, key, value, mask, num_heads=heads),
    ):
        np.testing.assert_allclose(out.reshape(batch * length, -1), expected, atol=FP32_ATOL)


def experts_reference(
    rows: np.ndarray, logits: np.ndarray, weights: list[np.ndarray], top_k: int, normalized: bool
) -> np.ndarray:
    """Row by row in float64; among equal probabilities the earlier expert comes first."""
    gate, up, down = (w.astype(np.float64) for w in weights)
    out = np.zeros(rows.shape)
    for row, (x, logit) in enumerate(zip(rows.astype(np.float64), logits, strict=True)):
        p = np.exp(logit - logit.max(), dtype=np.float32)
        p /= p.sum(dtype=np.float32)
        chosen = sorted(range(len(p)), key=lambda e: (-p[e], e))[:top_k]
        total = sum(float(p[e]) for e in chosen) if normalized else 1.0
        for e in chosen:
            inner = x @ gate[e]
            out[row] += float(p[e]) / total * ((inner / (1 + np.exp(-inner)) * (x @ up[e])) @ down[e])
    return out


@settings(max_examples=60)
@given(
    kept=st.integers(0, 9),
    experts=st.integers(1, 6),
    kind=st.sampled_from(["random", "ties", "one expert", "far apart"]),
    normalized=st.booleans(),
    data=st.data(),
)
def test_routed_experts(kept: int, experts: int, kind: str, normalized: bool, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    hidden, width = 5, 7
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits = rng.standard_normal((kept, experts)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "one expert":
        logits[:, :1] += 20
    elif kind == "far apart":  # the others' probabilities are 0
        logits *= 200
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    rows = random_rows(kept, hidden)
    expected = experts_reference(rows, logits, weights, top_k, normalized)
    for (out,) in (
        run_torch(routed_experts, rows, logits, *weights, top_k=top_k, normalized=normalized),
        run_onnx("RoutedExperts", rows, logits, *weights, top_k=top_k, normalized=int(normalized)),
    ):
        # Values reach 100: sums over five and seven products.
        np.testing.assert_allclose(out, expected, atol=20 * FP32_ATOL, rtol=1e-5)


def test_gradients() -> None:
    """Autograd of the ops against finite differences, in float64."""
    torch.manual_seed(0)
    x, score = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0.1, 0.9, 0.4, 0.8, 0.2])
    assert torch.autograd.gradcheck(lambda a: threshold_gather(a, score, torch.tensor(0.3))[0], (x,))
    assert torch.autograd.gradcheck(lambda a: topk_gather(a, score, torch.tensor([2]))[0], (x,))
    rows = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for width in (1, 3):
        gate = torch.randn(2, width, dtype=torch.float64, requires_grad=True)
        index = torch.tensor([1, 4])
        assert torch.autograd.gradcheck(lambda *a: gated_scatter_add(*a, index), (x, rows, gate))  # noqa: B023


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (threshold_gather, (torch.randn(5, 3), torch.rand(5), torch.tensor(0.5))),
        (topk_gather, (torch.randn(5, 3), torch.rand(5), torch.tensor([2]))),
        (gated_scatter_add, (torch.randn(5, 3), torch.randn(2, 3), torch.randn(2, 1), torch.tensor([0, 3]))),
        (full_attention, (torch.randn(1, 2, 16), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8),
                          torch.ones(1, 1, 2, 2, dtype=torch.bool), 2)),
        (gathered_attention, (torch.randn(1, 16), torch.tensor([1]), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8),
                              torch.ones(1, 1, 2, 2, dtype=torch.bool), 2)),
        (routed_experts, (torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 4, 5), torch.randn(2, 4, 5),
                          torch.randn(2, 5, 4), 1, True)),
    ],
)  # fmt: skip
def test_torch_ops_are_well_formed(op: object, arguments: tuple[object, ...]) -> None:
    """Schema, fake implementation and dispatch, by torch's own checker."""
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
