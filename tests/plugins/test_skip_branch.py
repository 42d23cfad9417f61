"""The products of a decode step that skip, run on the CPU by emulation of threads: `skip_branch/kernel.h` is the rule.

Sums of a GPU have another order than PyTorch's, so results are compared with float64, within what float32 sums and
the roundings that the rule names may differ. What must be exact is exact: rows that are skipped, and all bits in every
order of threads and blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.plugins import kernel_cases as cases
from tests.plugins.emulation import emulated_library
from tests.plugins.test_kernels import ORDERS

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# One rounding of a number to an element type, relative to it; float32's also covers the sums (below).
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A sum of n float32 products, each fused: at most n roundings, relative to the sum of the products' sizes.
SUM_ROUNDING = 2.0**-24
# Inner and outer sizes: 16-byte loads with few and with many columns, a rest in both, and what allows no such loads.
SIZES = [(64, 40), (37, 64), (1000, 24), (40, 12_904), (37, 23), (1, 1)]
THRESHOLD = 0.5


@dataclass(frozen=True)
class Case:
    """Operands; kept [N] bool. Rows of x and of the gate that are skipped are NaN: nobody may read them."""

    x: Tensor
    score: Tensor
    kept: Tensor
    weight: Tensor
    other: Tensor
    residual: Tensor
    gate: Tensor

    @property
    def threshold(self) -> Tensor:
        """One for all rows, or one for each."""
        count = len(self.score)
        return torch.full((count,), THRESHOLD) if count in (3, 8) else torch.tensor(THRESHOLD)


def case(rows: int, inner: int, width: int, decisions: int, dtype: torch.dtype, gate_width: int = 1) -> Case:
    kept = torch.tensor([bool(decisions >> row & 1) for row in range(rows)], dtype=torch.bool)
    below = torch.tensor([THRESHOLD, float("nan"), -float("inf"), 0.1] * 2)[:rows]  # equal to the threshold: skipped
    x, gate = (cases.matrix(rows, size, dtype, "cpu", seed) for size, seed in ((inner, 1), (gate_width, 2)))
    weight, other = (cases.matrix(inner, width, dtype, "cpu", seed) / inner**0.5 for seed in (3, 4))
    x[~kept], gate[~kept] = float("nan"), float("nan")
    score = torch.where(kept, torch.rand(rows) + 0.6, below)
    return Case(x, score, kept, weight, other, cases.matrix(rows, width, dtype, "cpu", 5), gate)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated_library()))


@pytest.fixture(params=ORDERS)
def ordered(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The kernels, run in an order of threads and blocks."""
    library.emulation_set_order(ORDERS[request.param], 1)
    yield library
    library.emulation_set_order(ORDERS["forward"], 1)


def call(library: ctypes.CDLL, name: str, tensors: list[Tensor], sizes: list[int], out: Tensor) -> int:
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    thresholds = tensors[4 if name == "linear_add" else 2].numel()
    status: int = getattr(library, f"gsx_skip_{name}")(
        *pointers,
        ctypes.c_int64(thresholds),
        *(ctypes.c_int64(size) for size in sizes),
        TYPES[out.dtype],
        ctypes.c_void_p(out.data_ptr()),
        None,
    )
    return status


def linear(library: ctypes.CDLL, one: Case) -> Tensor:
    out = torch.full_like(one.residual, float("nan"))
    sizes = [len(one.x), *one.weight.shape]
    assert call(library, "linear", [one.x, one.score, one.threshold, one.weight], sizes, out) == 0
    return out


def gate_up(library: ctypes.CDLL, one: Case) -> Tensor:
    out = torch.full_like(one.residual, 7.0)
    sizes = [len(one.x), *one.weight.shape]
    assert call(library, "gate_up", [one.x, one.score, one.threshold, one.weight, one.other], sizes, out) == 0
    return out


def linear_add(library: ctypes.CDLL, one: Case, *, in_place: bool = False) -> Tensor:
    out = one.residual.clone() if in_place else torch.full_like(one.residual, float("nan"))
    tensors = [out if in_place else one.residual, one.x, one.gate, one.score, one.threshold, one.weight]
    assert call(library, "linear_add", tensors, [len(one.x), *one.weight.shape, one.gate.shape[1]], out) == 0
    return out


def product(one: Case, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x W of the kept rows in float64, and how far a float32 sum that is rounded to the type may be from it."""
    x, exact = one.x[one.kept].double(), weight.double()
    return x @ exact, (x.abs() @ exact.abs()) * SUM_ROUNDING * len(weight) + (x @ exact).abs() * ROUNDING[weight.dtype]


def check(one: Case, library: ctypes.CDLL) -> list[Tensor]:
    """All three against the rule. Returns: the results."""
    unit = ROUNDING[one.x.dtype]
    found = linear(library, one)
    wanted, within = product(one, one.weight)
    assert torch.equal(found[~one.kept], torch.zeros_like(found[~one.kept]))
    assert ((found[one.kept].double() - wanted).abs() <= within).all()

    hidden = gate_up(library, one)
    a, a_within = product(one, one.weight)
    u, u_within = product(one, one.other)
    silu = a * torch.sigmoid(a)
    # |silu'| is at most 1.1; then three more roundings: of the sigmoid, of silu and of the product.
    within = 1.1 * a_within * (u.abs() + u_within) + u_within * silu.abs() + 3.1 * unit * (silu * u).abs() + 2.0**-24
    assert torch.equal(hidden[~one.kept], torch.full_like(hidden[~one.kept], 7.0))
    assert ((hidden[one.kept].double() - silu * u).abs() <= within).all()

    added = linear_add(library, one)
    gated, before = one.gate[one.kept].double() * wanted, one.residual[one.kept].double()
    _, within = product(one, one.weight)
    within = one.gate[one.kept].double().abs() * within + unit * (gated.abs() + (before + gated).abs() * 1.01)
    assert torch.equal(added[~one.kept], one.residual[~one.kept])
    assert ((added[one.kept].double() - before - gated).abs() <= within + 2.0**-24).all()
    assert torch.equal(linear_add(library, one, in_place=True), added)
    return [found, hidden, added]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "width"), SIZES)
def test_sizes(library: ctypes.CDLL, inner: int, width: int, dtype: torch.dtype) -> None:
    rows = 2 if inner * width > 100_000 else 8
    check(case(rows, inner, width, 0b01011010 if rows == 8 else 0b10, dtype, gate_width=width), library)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_all_decisions(library: ctypes.CDLL, rows: int, dtype: torch.dtype) -> None:
    for decisions in range(1 << rows):
        check(case(rows, 40, 24, decisions, dtype), library)


@pytest.mark.parametrize("rows", [4, 5, 8])
def test_the_same_bits_in_every_order(ordered: ctypes.CDLL, library: ctypes.CDLL, rows: int) -> None:
    """Also without races: the emulation reports them."""
    one = case(rows, 130, 72, 0b1101, torch.float16)
    results = check(one, ordered)
    library.emulation_set_order(ORDERS["forward"], 1)
    for found, wanted in zip(results, check(one, library), strict=True):
        cases.assert_same_bits(found, wanted, "out")


def test_a_skipped_branch_reads_nothing(library: ctypes.CDLL) -> None:
    """Its weights may be anything."""
    one = case(3, 64, 48, 0, torch.float16)
    one.weight.fill_(float("nan"))
    one.other.fill_(float("nan"))
    assert torch.equal(linear(library, one), torch.zeros(3, 48, dtype=torch.float16))
    assert torch.equal(gate_up(library, one), torch.full((3, 48), 7.0, dtype=torch.float16))
    assert torch.equal(linear_add(library, one), one.residual)


def test_wide_rows(library: ctypes.CDLL) -> None:
    check(case(1, 16_384, 16, 1, torch.bfloat16), library)


@pytest.mark.parametrize("offset", [1, 4])
def test_weights_that_are_not_aligned(library: ctypes.CDLL, offset: int) -> None:
    one = case(2, 33, 48, 0b11, torch.float16)
    moved = cases.matrix(33, 48, torch.float16, "cpu", 9, offset)
    check(Case(one.x, one.score, one.kept, moved, one.other, one.residual, one.gate), library)


def test_refusals(library: ctypes.CDLL) -> None:
    """Nothing is launched, and nothing is written."""
    one = case(2, 8, 8, 0b11, torch.float32)
    out = torch.zeros(2, 8)
    tensors = [one.x, one.score, one.threshold, one.weight]
    assert call(library, "linear", tensors, [9, 8, 8], out) == -4
    assert call(library, "linear", [*tensors[:2], torch.zeros(3), tensors[3]], [2, 8, 8], out) == -3
    assert call(library, "linear", tensors, [-1, 8, 8], out) == -3
    assert call(library, "linear", tensors, [2, 0, 8], out) == -3
    assert call(library, "linear", tensors, [0, 8, 8], out) == 0
    moved = one.x.view(-1)[:15].view(torch.int16)[1:]
    assert call(library, "linear", [moved, *tensors[1:]], [1, 7, 8], out) == -5
    add = [one.residual, one.x, one.gate, *tensors[1:]]
    assert call(library, "linear_add", add, [2, 8, 8, 3], out) == -3
    assert not out.any()
