"""The TensorRT plugins run: their own sources with the emulated kernels, called as TensorRT calls them.

It needs TensorRT's headers, no TensorRT: a small stand-in (emulation/enqueue.cpp) creates a plugin, asks it about
tensors and scratch memory, attaches it and enqueues it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gsx_plugins.build import find_headers
from gsx_plugins.errors import PluginLibraryError
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.library import SOURCE_FOLDER
from gsx_plugins.threshold_gather.op import threshold_gather
from gsx_plugins.topk_gather.op import topk_gather
from tests.plugins import kernel_cases as cases
from tests.plugins.emulation import KERNELS, emulated_library
from tests.plugins.test_step_attention import HALVES, Sizes, case

# TensorRT's numbers of element types.
TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bool: 4, torch.bfloat16: 7, torch.int64: 8}
WIDTH = 40
MORE_TOKENS = 5000  # that the profile allows


@pytest.fixture(scope="module")
def tensorrt() -> ctypes.CDLL:
    try:
        headers = find_headers().folder
    except PluginLibraryError as error:
        pytest.skip(f"the plugins cannot be compiled here: {error}")
    adapters = [*SOURCE_FOLDER.glob("*/plugin.cpp"), Path(__file__).parent / "emulation" / "enqueue.cpp"]
    return ctypes.CDLL(str(emulated_library("plugins", [*KERNELS, *adapters], headers=[headers])))


def enqueue(
    tensorrt: ctypes.CDLL,
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    numbers: Sequence[float] = (),
    calls: int = 1,
) -> int:
    tensors = [*inputs, *outputs]
    count = len(tensors)
    dims = ((ctypes.c_int64 * 8) * count)(*((ctypes.c_int64 * 8)(*tensor.shape) for tensor in tensors))
    status: int = tensorrt.enqueue(
        name.encode(),
        len(inputs),
        len(outputs),
        (ctypes.c_int32 * count)(*(TYPES[tensor.dtype] for tensor in tensors)),
        (ctypes.c_int32 * count)(*(tensor.dim() for tensor in tensors)),
        dims,
        (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors)),
        ctypes.c_int64(len(inputs[0]) + MORE_TOKENS),
        (ctypes.c_float * len(numbers))(*numbers),
        len(numbers),
        calls,
    )
    return status


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 300, 20_011])
@pytest.mark.parametrize("name", ["TopKGather", "ThresholdGather"])
def test_selection(tensorrt: ctypes.CDLL, name: str, n: int, dtype: torch.dtype) -> None:
    """K depends on the data: outputs have room for all tokens, and the first K rows are written."""
    x, score = cases.matrix(n, WIDTH, dtype, "cpu", 1), torch.rand(n, generator=cases.seeded(2))
    limit = torch.tensor([n // 3]) if name == "TopKGather" else torch.tensor(0.6)
    expected = (topk_gather if name == "TopKGather" else threshold_gather)(x, score, limit)
    rows, index, count = torch.zeros_like(x), torch.full((n,), -1), torch.tensor(-1)
    assert enqueue(tensorrt, name, [x, score, limit], [rows, index, count]) == 0
    kept = int(count)
    assert kept == int(expected[2])
    assert torch.equal(index[:kept], expected[1])
    cases.assert_same_bits(rows[:kept], expected[0], "rows")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("gate_width", [1, WIDTH])
@pytest.mark.parametrize("kept", [0, 77])
def test_scatter(tensorrt: ctypes.CDLL, kept: int, gate_width: int, dtype: torch.dtype) -> None:
    residual, rows = (cases.matrix(size, WIDTH, dtype, "cpu", size) for size in (200, kept))
    gate = cases.matrix(kept, gate_width, dtype, "cpu", 3)
    index = cases.kept_places(200, kept, 4, ascending=True)
    out = torch.zeros_like(residual)
    assert enqueue(tensorrt, "GatedScatterAdd", [residual, rows, gate, index], [out]) == 0
    cases.assert_same_bits(out, gated_scatter_add(residual, rows, gate, index), "out")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_products_of_a_step(tensorrt: ctypes.CDLL, dtype: torch.dtype) -> None:
    """The adapters pass the right tensors and sizes; what the kernels compute is checked in test_skip_branch.py."""
    x, residual = (cases.matrix(3, width, dtype, "cpu", width) for width in (WIDTH, 24))
    weight, up = (cases.matrix(WIDTH, 24, dtype, "cpu", seed) / 8 for seed in (1, 2))
    gate, score, limit = cases.matrix(3, 1, dtype, "cpu", 3), torch.tensor([0.9, 0.2, 0.8]), torch.tensor(0.5)
    kept = score > limit
    product, other = (x.double() @ matrix.double() for matrix in (weight, up))
    loose = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 2**-9, "atol": 2**-9}
    out = torch.full_like(residual, 7.0)
    assert enqueue(tensorrt, "SkipLinear", [x, score, limit, weight], [out]) == 0
    torch.testing.assert_close(out.double(), product * kept[:, None], **loose)
    out.fill_(7.0)
    assert enqueue(tensorrt, "SkipGateUp", [x, score, limit, weight, up], [out]) == 0
    torch.testing.assert_close(out[kept].double(), (product * product.sigmoid() * other)[kept], **loose)
    assert (out[~kept] == 7.0).all()
    assert enqueue(tensorrt, "SkipLinearAdd", [residual, x, gate, score, limit, weight], [out]) == 0
    torch.testing.assert_close(out.double(), residual.double() + gate.double() * product * kept[:, None], **loose)
    logits = torch.full((3, 24), 7.0)
    assert enqueue(tensorrt, "GateLinear", [x, weight], [logits]) == 0
    torch.testing.assert_close(logits.double(), product, rtol=1e-5, atol=1e-5)
    assert enqueue(tensorrt, "SkipLinear", [x, score, limit, weight[:-1].clone()], [out]) == -50


@pytest.mark.parametrize(("ending", "kind"), [("Int8", torch.int8), ("E4M3", torch.float8_e4m3fn)])
def test_products_of_codes(
    tensorrt: ctypes.CDLL, ending: str, kind: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    """Codes come as int32, four in each; the scales of gate and up may have different blocks if they are INT8."""
    dtype, width = torch.float16, 32
    x, residual = (cases.matrix(3, size, dtype, "cpu", size) for size in (WIDTH, width))
    gate, score, limit = cases.matrix(3, 1, dtype, "cpu", 3), torch.tensor([0.9, 0.2, 0.8]), torch.tensor(0.5)
    kept = score > limit
    codes = [(cases.matrix(WIDTH, width, torch.float32, "cpu", seed) * 20).to(kind) for seed in (1, 2)]
    blocks = (1, 5 if kind == torch.int8 else 1)
    scales = [torch.rand(count, width, generator=cases.seeded(4)).add(0.5).div(200).to(dtype) for count in blocks]
    packed = [one.view(torch.int32) for one in codes]
    product, other = (
        x.double() @ (one.double() * scale.double().repeat_interleave(WIDTH // len(scale), 0))
        for one, scale in zip(codes, scales, strict=True)
    )
    loose = {"rtol": 2**-9, "atol": 2**-9}
    pair, out = [packed[0], scales[0]], torch.full_like(residual, 7.0)
    assert enqueue(tensorrt, f"SkipLinear{ending}", [x, score, limit, *pair], [out]) == 0
    torch.testing.assert_close(out.double(), product * kept[:, None], **loose)
    out.fill_(7.0)
    both = [*pair, packed[1], scales[1]]
    assert enqueue(tensorrt, f"SkipGateUp{ending}", [x, score, limit, *both], [out]) == 0
    torch.testing.assert_close(out[kept].double(), (product * product.sigmoid() * other)[kept], **loose)
    assert (out[~kept] == 7.0).all()
    assert enqueue(tensorrt, f"SkipLinearAdd{ending}", [residual, x, gate, score, limit, *pair], [out]) == 0
    torch.testing.assert_close(out.double(), residual.double() + gate.double() * product * kept[:, None], **loose)
    logits = torch.full((3, width), 7.0)
    assert enqueue(tensorrt, f"GateLinear{ending}", [x, packed[0], scales[0].float()], [logits]) == 0
    torch.testing.assert_close(logits.double(), product, rtol=1e-5, atol=1e-5)
    # Codes of a wrong type; codes and scales of different widths; float32 rows, for which no kernel takes codes.
    assert (
        enqueue(tensorrt, f"SkipLinear{ending}", [x, score, limit, scales[0].view(torch.int64), scales[0]], [out])
        == -23
    )
    assert enqueue(tensorrt, f"SkipLinear{ending}", [x, score, limit, packed[0][:, 4:].clone(), scales[0]], [out]) == -1
    assert "sizes do not fit each other" in capfd.readouterr().err
    floats = [x.float(), score, limit, packed[0], scales[0].float()]
    assert enqueue(tensorrt, f"SkipLinear{ending}", floats, [out.float()]) == -1
    assert f"SkipLinear{ending}: no kernel for weights of this type" in capfd.readouterr().err


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention_of_a_step(tensorrt: ctypes.CDLL, dtype: torch.dtype, skips: bool) -> None:
    """In place, with counters that the plugin keeps between calls; the kernel is checked in test_step_attention.py."""
    sizes = Sizes((150, 20), tokens=2, softcap=5.0, window=90)
    one = case(sizes, 0b1011, dtype, skips=skips)
    of = one.of
    assert of.tables is not None
    numbers = (1.0, 1.0, 0.25, sizes.softcap, sizes.window)
    wanted = [cache.clone() for cache in one.past]
    kernels = cases.GuardedKernels(emulated_library())
    rows = kernels.step_attention(replace(of, scale=0.25), (wanted[0], wanted[1]))
    tensors = [of.query, torch.cat([of.key, of.value], 1), *of.tables, of.mask, of.write_at, *one.past]
    if of.score is not None and of.threshold is not None:
        tensors += [of.score, of.threshold]
    out = torch.full_like(of.query, 7.0)
    name = "SkipAttention" if skips else "StepAttention"
    assert enqueue(tensorrt, name, tensors, [out, *one.past], numbers, calls=3) == 0
    assert (out[~one.kept] == 7.0).all()
    cases.assert_same_bits(out[one.kept], rows[one.kept], "rows")
    for found, cache in zip(one.past, wanted, strict=True):
        cases.assert_same_bits(found, cache, "cache")


def test_attention_without_queries(tensorrt: ctypes.CDLL) -> None:
    """Where the host decided that nobody attends, the cache gets the same as where somebody does."""
    one = case(Sizes((50,), tokens=2), 0b11, torch.float16, skips=False)
    of = one.of
    assert of.tables is not None
    before = [cache.clone() for cache in one.past]
    operands = [torch.cat([of.key, of.value], 1), *of.tables, of.mask, of.write_at]
    for query, past in ((of.query, before), (of.query[:0], one.past)):
        out = torch.full_like(query, 7.0)
        tensors = [query, *operands, *past]
        assert enqueue(tensorrt, "StepAttention", tensors, [out, *past], (1.0, 1.0, 0.0, 0.0, 0.0)) == 0
    for found, wanted in zip(one.past, before, strict=True):
        cases.assert_same_bits(found, wanted, "cache")


def test_refused_attention(tensorrt: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    one = case(Sizes((50,)), 1, torch.float16, skips=False)
    of = one.of
    assert of.tables is not None
    tensors = [of.query, torch.cat([of.key, of.value], 1), *of.tables, of.mask, of.write_at, *one.past]
    out, numbers = [torch.zeros_like(of.query), *one.past], [1.0, 1.0, 0.0, 0.0, 0.0]
    assert enqueue(tensorrt, "StepAttention", tensors, out, numbers[:4]) == -10
    assert "StepAttention: node node has no field 'window'" in capfd.readouterr().err
    cut = [*tensors[:4], of.mask[..., :-1].contiguous(), *tensors[5:]]
    assert enqueue(tensorrt, "StepAttention", cut, out, numbers) == -50
    assert "StepAttention: input past_key: axis 2 has size 200, expected 199" in capfd.readouterr().err
    wide = [torch.zeros(1, 64 * 3 + 1, dtype=torch.float16), *tensors[1:]]
    assert enqueue(tensorrt, "StepAttention", wide, [torch.zeros_like(wide[0]), *one.past], numbers) == -1
    assert "sizes do not fit each other" in capfd.readouterr().err


def test_refusals(tensorrt: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    """A type and a shape that the op does not take, and an op that does not exist: no call reaches a kernel."""
    x, score, k = torch.zeros(8, 4), torch.zeros(8), torch.tensor([2])
    outputs = [torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64), torch.tensor(0)]
    assert enqueue(tensorrt, "TopKGather", [x, score.half(), k], outputs) == -21
    assert enqueue(tensorrt, "TopKGather", [x, score[:7], k], outputs) == -50
    assert "TopKGather: input score: axis 0 has size 7, expected 8" in capfd.readouterr().err
    assert enqueue(tensorrt, "TopK", [x, score, k], outputs) == -10
