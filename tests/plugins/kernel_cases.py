"""Checks of the kernels' results, as functions of a library and a device: on a CPU they run the emulated kernels
(`test_kernels.py`), on a GPU the real ones (`tests/gpu`). The reference is plain PyTorch on the CPU: the eager ops.

Every buffer that the kernels write is between guards and filled with garbage at first. So a write beyond the end, a
result that is not written, and scratch memory that is assumed to be cleared are all detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gsx_plugins.cuda import Kernels
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.threshold_gather.op import threshold_gather
from gsx_plugins.topk_gather.op import topk_gather

GARBAGE = 0xA5
GUARD_BYTES = 256
NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {2: torch.int16, 4: torch.int32}

# Around every boundary in the kernels: warps, tiles of 2,048, the paths for few and many tokens (512, 8,192, 16,384).
SIZES = (0, 1, 2, 31, 32, 33, 127, 128, 129, 511, 512, 513, 2047, 4097, 8191, 8192, 8193, 16383, 16384, 16385, 20011)
LARGE_SIZES = (65_536, 131_072, 262_144, 1_000_003)


def _sigmoid(n: int, rng: torch.Generator) -> Tensor:
    return torch.sigmoid(torch.randn(n, generator=rng))


def _any_bits(n: int, rng: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,), generator=rng).to(torch.int32).view(torch.float32)


def _one_of(values: Sequence[float]) -> object:
    def draw(n: int, rng: torch.Generator) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (n,), generator=rng)]

    return draw


# Kinds of scores, as a function of their number.
SCORES = {
    "gate scores": _sigmoid,
    "any bits": _any_bits,
    "ties": _one_of([0.25, 0.5, 0.75]),
    "all the same": _one_of([0.5]),
    "zeros of both signs": _one_of([0.0, -0.0]),
    "NaN": _one_of([NAN, -NAN, 0.5, -0.5]),
    "all NaN": _one_of([NAN]),
    "the ends of the range": _one_of([INF, -INF, NAN, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]),
    "neighbours": lambda n, rng: (0x3F000000 + torch.randperm(n, generator=rng)).to(torch.int32).view(torch.float32),
    "rising": lambda n, rng: torch.arange(n, dtype=torch.float32),
    "falling": lambda n, rng: -torch.arange(n, dtype=torch.float32),
}


class GuardedKernels(Kernels):
    """Kernels whose results and scratch memory are guarded; `verify` after every call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._whole: list[tuple[Tensor, int]] = []

    def empty(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((2 * GUARD_BYTES + size,), GARBAGE, dtype=torch.uint8, device=like.device)
        self._whole.append((whole, size))
        return whole[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(tuple(shape))

    def verify(self) -> None:
        """Raises: AssertionError if a kernel wrote outside its buffers."""
        for whole, size in self._whole:
            guards = torch.cat((whole[:GUARD_BYTES], whole[GUARD_BYTES + size :]))
            assert bool((guards == GARBAGE).all()), f"a write beside a buffer of {size} bytes"
        self._whole.clear()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def garbage_of(dtype: torch.dtype) -> Tensor:
    return torch.full((dtype.itemsize,), GARBAGE, dtype=torch.uint8).view(dtype)


def assert_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Check that all bits are equal, except for a NaN's payload."""
    found = found.cpu()
    same = found.view(BITS[found.element_size()]) == expected.view(BITS[expected.element_size()])
    same |= found.isnan() & expected.isnan()
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"


def assert_places(index: Tensor, count: Tensor, expected: Tensor, what: str) -> None:
    index = index.cpu()
    assert int(count) == len(expected), f"{what}: {int(count)} kept, expected {len(expected)}"
    assert torch.equal(index[: len(expected)], expected), f"{what}: other places"
    rest = index[len(expected) :]
    assert bool((rest == garbage_of(torch.int64)).all()), f"{what}: written behind the end of the list"


def wanted_counts(n: int) -> list[int]:
    return sorted({-1, 0, 1, n // 3, n // 2, n - 1, n, n + 1})


def check_topk(kernels: GuardedKernels, device: str, n: int, kind: str, k: int) -> None:
    """One selection of the K best, against the torch op (which takes K from 0 to N; beyond, K is cut off)."""
    score = SCORES[kind](n, seeded(n))
    index, count = kernels.topk_select(score.to(device), torch.tensor([k], device=device))
    kernels.verify()
    expected = topk_gather(score[:, None], score, torch.tensor([min(max(k, 0), n)]))[1]
    assert_places(index, count, expected, f"topk of {n} {kind}, k {k}")


def thresholds_for(score: Tensor) -> list[float]:
    some = [float(score[len(score) // 2])] if len(score) else []
    return [-INF, 0.5, *some, INF, NAN]


def check_threshold(kernels: GuardedKernels, device: str, n: int, kind: str) -> None:
    """Threshold selection at several thresholds, one of them equal to a score, and with one for each."""
    score = SCORES[kind](n, seeded(n))
    for threshold in thresholds_for(score):
        tau = torch.tensor(threshold)
        index, count = kernels.threshold_select(score.to(device), tau.to(device))
        kernels.verify()
        expected = threshold_gather(score[:, None], score, tau)[1]
        assert_places(index, count, expected, f"threshold {threshold} of {n} {kind}")
    some = thresholds_for(score)
    each = torch.tensor([some[place % len(some)] for place in range(n)], dtype=torch.float32)
    index, count = kernels.threshold_select(score.to(device), each.to(device))
    kernels.verify()
    expected = threshold_gather(score[:, None], score, each)[1]
    assert_places(index, count, expected, f"a threshold for each of {n} {kind}")


def matrix(rows: int, width: int, dtype: torch.dtype, device: str, seed: int, offset: int = 0) -> Tensor:
    """Random rows; with an offset they begin that many elements after an aligned address."""
    values = torch.randn(offset + rows * width, generator=seeded(seed)).to(dtype).to(device)
    return values[offset:].view(rows, width)


def kept_places(n: int, k: int, seed: int, *, ascending: bool) -> Tensor:
    places = torch.randperm(n, generator=seeded(seed))[:k]
    return places.sort().values if ascending else places


# Tokens, rows kept, width, offset of the first element: vectors, odd widths, rows wider than a block, misaligned.
ROWS = (
    (0, 0, 8, 0),
    (1, 0, 8, 0),
    (1, 1, 1, 0),
    (5, 5, 3, 0),
    (7, 4, 8, 0),
    (33, 20, 64, 0),
    (33, 20, 64, 1),
    (9, 6, 129, 0),
    (40, 31, 1000, 0),
    (6, 4, 4096, 0),
    (3, 2, 4100, 0),
    (3, 2, 10_240, 0),
    (2, 1, 9_001, 3),
)


def check_gather(
    kernels: GuardedKernels, device: str, n: int, k: int, width: int, offset: int, dtype: torch.dtype
) -> None:
    """The row gather: K on the host, K on the device with room for N, and indices outside x."""
    x = matrix(n, width, dtype, device, 1, offset)
    places = kept_places(n, k, 2, ascending=True)
    expected = x.cpu()[places]
    what = f"gather of {k} from {n} x {width} {dtype}, offset {offset}"
    found = kernels.gather_rows(x, places.to(device))
    kernels.verify()
    assert_same_bits(found, expected, what)

    room = torch.cat((places, torch.zeros(n - k, dtype=torch.int64))).to(device)
    found = kernels.gather_rows(x, room, torch.tensor(k, device=device))
    kernels.verify()
    assert_same_bits(found[:k], expected, f"{what}, count on the device")
    assert bool((found[k:].cpu() == garbage_of(dtype)).all()), f"{what}: rows behind the count were written"

    if k:
        outside = places.clone()
        outside[0], outside[-1] = -1, n
        found = kernels.gather_rows(x, outside.to(device))
        kernels.verify()
        for row, place in enumerate(outside.tolist()):
            row_expected = x[place].cpu() if 0 <= place < n else torch.zeros(width, dtype=dtype)
            assert_same_bits(found[row], row_expected, f"{what}, a place outside")


def check_scatter(
    kernels: GuardedKernels,
    device: str,
    n: int,
    k: int,
    width: int,
    offset: int,
    dtype: torch.dtype,
    *,
    scalar_gate: bool,
) -> None:
    """The gated scatter-add, into its own buffer and in place, with indices in any order, exact to the bit."""
    residual = matrix(n, width, dtype, device, 3, offset)
    rows = matrix(k, width, dtype, device, 4, offset)
    gate = matrix(k, 1 if scalar_gate else width, dtype, device, 5, offset)
    places = kept_places(n, k, 6, ascending=False)
    expected = gated_scatter_add(residual.cpu(), rows.cpu(), gate.cpu(), places)
    what = f"scatter of {k} into {n} x {width} {dtype}, gate {tuple(gate.shape)}, offset {offset}"
    found = kernels.gated_scatter_add(residual, rows, gate, places.to(device))
    kernels.verify()
    assert_same_bits(found, expected, what)
    copy = residual.clone() if offset == 0 else residual
    found = kernels.gated_scatter_add(copy, rows, gate, places.to(device), out=copy)
    assert_same_bits(found, expected, f"{what}, in place")
    if k and n > 1:
        outside = places.clone()
        outside[0] = n
        if offset == 0:
            expected = gated_scatter_add(residual.cpu(), rows.cpu()[1:], gate.cpu()[1:], places[1:])
            found = kernels.gated_scatter_add(residual, rows, gate, outside.to(device))
            kernels.verify()
            assert_same_bits(found, expected, f"{what}, a place outside")


ROW_CASES = [(*sizes, dtype) for dtype in DTYPES for sizes in ROWS]
