"""The kernels, run on the CPU by emulation of threads and warps: the same checks as `tests/gpu` runs on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsx_plugins import cuda
from gsx_plugins.cuda import Kernels
from gsx_plugins.errors import PluginLibraryError
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.gathered_attention.op import gathered_attention
from gsx_plugins.threshold_gather.op import threshold_gather
from gsx_plugins.topk_gather.op import topk_gather
from tests.plugins import kernel_cases as cases
from tests.plugins.emulation import emulated_library

# The order in which threads get their turn; in the last one blocks run together, in a random order.
ORDERS = {"forward": 0, "reverse": 1, "together": 2}
CPU = "cpu"
FP32_ATOL = 2e-6  # a few roundings of float32 at values of order 1


@pytest.fixture(scope="module")
def emulated() -> cases.GuardedKernels:
    return cases.GuardedKernels(emulated_library())


@pytest.fixture(params=[(order, 1) for order in ORDERS], ids=ORDERS)
def kernels(request: pytest.FixtureRequest, emulated: cases.GuardedKernels) -> Iterator[cases.GuardedKernels]:
    """The kernels, run in an order that depends on a seed."""
    order, seed = request.param
    emulated._library.emulation_set_order(ORDERS[order], seed)
    yield emulated
    emulated._library.emulation_set_order(ORDERS["forward"], 1)


@pytest.mark.parametrize("n", cases.SIZES)
def test_topk_at_every_boundary(kernels: cases.GuardedKernels, n: int) -> None:
    for k in {0, 1, n // 2, n}:
        cases.check_topk(kernels, CPU, n, "gate scores", k)


@pytest.mark.parametrize("kind", cases.SCORES)
def test_topk_of_every_kind_of_score(emulated: cases.GuardedKernels, kind: str) -> None:
    for n in (1, 200, 3000):
        for k in cases.wanted_counts(n):
            cases.check_topk(emulated, CPU, n, kind, k)
    for n in (9000, 20_011):  # the paths for more tokens
        for k in (0, n // 3, n):
            cases.check_topk(emulated, CPU, n, kind, k)


@pytest.mark.parametrize("n", cases.SIZES)
def test_threshold_at_every_boundary(kernels: cases.GuardedKernels, n: int) -> None:
    cases.check_threshold(kernels, CPU, n, "gate scores")


@pytest.mark.parametrize("kind", cases.SCORES)
def test_threshold_of_every_kind_of_score(emulated: cases.GuardedKernels, kind: str) -> None:
    for n in (1, 200, 3000, 9000):
        cases.check_threshold(emulated, CPU, n, kind)


@settings(max_examples=60)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=700),
    few=st.integers(1, 2**32 - 1),
    share=st.floats(0, 1),
)
def test_topk_of_any_scores(bits: list[int], few: int, share: float) -> None:
    """Any bits, and few distinct ones (a mask makes ties)."""
    score = torch.tensor([b & few for b in bits]).to(torch.int32).view(torch.float32)
    k = torch.tensor([round(share * len(bits))])
    index, count = Kernels(emulated_library()).topk_select(score, k)
    expected = topk_gather(score[:, None], score, k)[1]
    assert index[: int(count)].tolist() == expected.tolist()


@pytest.mark.parametrize("kernels", [("together", seed) for seed in range(2, 6)], indirect=True, ids=str)
@pytest.mark.parametrize("kind", ["gate scores", "ties"])
def test_blocks_at_the_same_time(kernels: cases.GuardedKernels, kind: str) -> None:
    """All ways in which blocks communicate, with more blocks than run at a time."""
    n = 24_001
    cases.check_topk(kernels, CPU, n, kind, n // 3)
    cases.check_threshold(kernels, CPU, n, kind)


@pytest.mark.parametrize("case", cases.ROW_CASES, ids=str)
def test_gather(emulated: cases.GuardedKernels, case: tuple[int, int, int, int, torch.dtype]) -> None:
    cases.check_gather(emulated, CPU, *case)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("case", cases.ROW_CASES, ids=str)
def test_scatter(emulated: cases.GuardedKernels, case: tuple[int, int, int, int, torch.dtype], gate: str) -> None:
    cases.check_scatter(emulated, CPU, *case, scalar_gate=gate == "scalar")


def test_torch_ops_by_kernels(emulated: cases.GuardedKernels) -> None:
    """The ops' results for CUDA tensors, including strided ones."""
    x, score = cases.matrix(300, 40, torch.bfloat16, CPU, 1).t().contiguous().t(), torch.rand(600)[::2]
    k, tau = torch.tensor([77]), torch.tensor(0.4)
    for ours, theirs in (
        (cuda.run_topk_gather(emulated, x, score, k), topk_gather(x, score, k)),
        (cuda.run_threshold_gather(emulated, x, score, tau), threshold_gather(x, score, tau)),
    ):
        rows, index, count = ours
        assert torch.equal(index, theirs[1])
        assert int(count) == int(theirs[2])
        cases.assert_same_bits(rows, theirs[0], "rows")
        gate = cases.matrix(len(index), 1, torch.bfloat16, CPU, 2)
        found = cuda.run_gated_scatter_add(emulated, x, rows, gate, index)
        cases.assert_same_bits(found, gated_scatter_add(x, rows, gate, index), "scatter")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kept", [[], [1], [0, 2, 4], [3, 4, 5]])
@pytest.mark.parametrize("numbers", [(), (0.5,), (0.5, 2.0)], ids=["plain", "scaled", "capped"])
def test_attention_as_cuda_runs_it(kept: list[int], batch: int, numbers: tuple[float, ...]) -> None:
    """Grouped K/V heads, sequences without a kept row, no kept row at all; with the scale and the cap of Gemma 2."""
    length, heads, width = 6 // batch, 4, 8
    query = cases.matrix(6, heads * width, torch.float32, CPU, 1)
    key, value = (torch.randn(batch, 2, length + 3, width, generator=cases.seeded(seed)) for seed in (2, 3))
    mask = torch.ones(length, length + 3, dtype=torch.bool).tril(3).expand(batch, 1, -1, -1)
    index = torch.tensor(kept, dtype=torch.int64)
    arguments = (query[kept], index, key, value, mask, heads, *numbers)
    found = cuda.run_gathered_attention(*arguments)
    torch.testing.assert_close(found, gathered_attention(*arguments), atol=FP32_ATOL, rtol=0)


# Status codes of native/status.h, by what is wrong.
NULL, UNKNOWN_TYPE, BAD_SIZE, TOO_LARGE, MISALIGNED, SMALL_WORKSPACE = -1, -2, -3, -4, -5, -6


@pytest.fixture(scope="module")
def library(emulated: cases.GuardedKernels) -> ctypes.CDLL:
    return emulated._library


def test_refused_arguments(library: ctypes.CDLL) -> None:
    """Every check of the C interface: nothing is launched, and the status says why."""
    memory = torch.zeros(1 << 16, dtype=torch.float64).data_ptr()
    select, gather, scatter = library.gsx_topk_select, library.gsx_gather_rows, library.gsx_gated_scatter_add
    threshold = library.gsx_threshold_select
    m, big = memory, 20_000
    rows = [
        (select(None, m, 8, m, m, None, 0, None), NULL),
        (select(m, None, 8, m, m, None, 0, None), NULL),
        (select(m, m, 8, None, m, None, 0, None), NULL),
        (select(m, m, 8, m, None, None, 0, None), NULL),
        (select(m, m, -1, m, m, None, 0, None), BAD_SIZE),
        (select(m, m, 2**31, m, m, None, 0, None), TOO_LARGE),
        (select(m + 2, m, 8, m, m, None, 0, None), MISALIGNED),
        (select(m, m + 4, 8, m, m, None, 0, None), MISALIGNED),
        (select(m, m, big, m, m, None, 0, None), SMALL_WORKSPACE),
        (select(m, m, big, m, m, None, 1 << 20, None), NULL),
        (select(m, m, big, m, m, m + 8, 1 << 20, None), MISALIGNED),
        (threshold(None, m, 1, 8, m, m, None, 0, None), NULL),
        (threshold(m, None, 8, 8, m, m, None, 0, None), NULL),
        (threshold(m, m, 7, 8, m, m, None, 0, None), BAD_SIZE),
        (threshold(m, m, 1, big, m, m, m, 8, None), SMALL_WORKSPACE),
        (gather(m, 8, 4, 7, m, None, 2, m, None), UNKNOWN_TYPE),
        (gather(m, 8, 0, 0, m, None, 2, m, None), BAD_SIZE),
        (gather(m, 8, 2**29, 0, m, None, 2, m, None), TOO_LARGE),
        (gather(None, 8, 4, 0, m, None, 2, m, None), NULL),
        (gather(m, 8, 4, 0, m, None, 2, None, None), NULL),
        (gather(m, 8, 4, 0, m, m + 4, 2, m, None), MISALIGNED),
        (scatter(m, m, m, m, None, 8, 2, 4, 3, 0, m + 1024, m, 64, None), BAD_SIZE),
        (scatter(m, m, m, m, None, 8, 2, 4, 4, 0, m + 1024, m, 8, None), SMALL_WORKSPACE),
        (scatter(m, None, m, m, None, 8, 2, 4, 4, 0, m + 1024, m, 64, None), NULL),
        (scatter(m, m, m, m, None, 8, 2, 4, 4, 1, m + 1025, m, 64, None), MISALIGNED),
    ]
    assert [found for found, _ in rows] == [expected for _, expected in rows]


def test_every_status_has_a_text(library: ctypes.CDLL) -> None:
    texts = [library.gsx_error_string(-status).decode() for status in range(8)]
    assert texts[0] == "success"
    assert len(set(texts)) == 8
    assert library.gsx_error_string(-8) == b"not a status of gsx"
    assert library.gsx_error_string(1) == b"an error of CUDA"


def test_workspace_grows_with_the_tokens(library: ctypes.CDLL) -> None:
    """TensorRT asks once, for the largest shape of a profile."""
    for name in ("topk_select", "threshold_select", "gated_scatter_add"):
        workspace = getattr(library, f"gsx_{name}_workspace")
        sizes = [workspace(n) for n in (0, 1, 8192, 8193, 16384, 16385, 10**6, 2**31 - 4097)]
        assert sizes == sorted(sizes)
        assert sizes[0] == 0


def test_a_refused_call_raises(emulated: cases.GuardedKernels) -> None:
    with pytest.raises(PluginLibraryError, match=r"gsx_gather_rows: a size is negative.*\(status -3\)"):
        emulated.gather_rows(torch.zeros(4, 0), torch.tensor([0]))


def test_a_file_that_is_not_a_library(tmp_path: object) -> None:
    path = tmp_path / "library.so"  # type: ignore[operator]
    path.write_bytes(b"not a library")
    with pytest.raises(PluginLibraryError, match="does not load"):
        Kernels(path)
