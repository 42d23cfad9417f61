"""The products of a decode step that skip, run on the CPU by emulation of threads: `skip_branch/kernel.h` is the rule.

Sums of a GPU have another order than PyTorch's, so results are compared with float64, within what float32 sums and
the roundings that the rule names may differ. What must be exact is exact: rows that are skipped, every code of 8 bits,
and all bits in every order of threads and blocks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gsx_plugins.cuda import TYPES, Codes, matrix_of
from gsx_plugins.errors import PluginLibraryError
from tests.plugins import kernel_cases as cases
from tests.plugins.emulation import emulated_library
from tests.plugins.test_kernels import ORDERS

# One rounding of a number to an element type, relative to it; float32's also covers the sums (below).
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A sum of n float32 products, each fused: at most n roundings, relative to the sum of the products' sizes. Two more
# where codes are multiplied by their scale, before or after the sum.
SUM_ROUNDING = 2.0**-24
# Inner and outer sizes: 16-byte loads with few and with many columns, a rest in both, and what allows no such loads.
SIZES = [(64, 40), (37, 64), (1000, 24), (40, 12_904), (37, 23), (1, 1)]
# Of codes, whose columns come in sixteens.
CODE_SIZES = [(64, 48), (264, 32), (40, 12_816), (8, 16)]
THRESHOLD = 0.5
HALVES = (torch.float16, torch.bfloat16)
# Weights that are codes: their type, and how many inputs share a scale (0: all).
FORMS = {"int8": (torch.int8, 0), "int8 in blocks": (torch.int8, 8), "e4m3": (torch.float8_e4m3fn, 0)}
BAD_SIZE, TOO_LARGE, MISALIGNED, UNKNOWN_WEIGHTS = -3, -4, -5, -7

Weight = Tensor | Codes


@dataclass(frozen=True)
class Case:
    """Operands; kept [N] bool. Rows of x and of the gate that are skipped are NaN: nobody may read them."""

    x: Tensor
    score: Tensor
    kept: Tensor
    weight: Weight
    other: Weight
    residual: Tensor
    gate: Tensor

    @property
    def threshold(self) -> Tensor:
        """One for all rows, or one for each."""
        count = len(self.score)
        return torch.full((count,), THRESHOLD) if count in (3, 8) else torch.tensor(THRESHOLD)


def codes(inner: int, width: int, form: str, dtype: torch.dtype, seed: int) -> Codes:
    """Random codes; scales as for weights of order 1 / sqrt(inner)."""
    kind, block = FORMS[form]
    rng = cases.seeded(seed)
    largest = 127 if kind == torch.int8 else 448
    values = (torch.rand(inner, width, generator=rng) * 2 - 1) * largest
    values = values.round().to(kind) if kind == torch.int8 else values.to(kind)
    scales = torch.rand(inner // block if block else 1, width, generator=rng) + 0.5
    return Codes(values, (scales / largest / inner**0.5).to(dtype))


def exact(weight: Weight) -> Tensor:
    """What a matrix stands for, in float64."""
    if isinstance(weight, Tensor):
        return weight.double()
    return weight.values.double() * weight.scales.double().repeat_interleave(
        len(weight.values) // len(weight.scales), 0
    )


def case(
    rows: int, inner: int, width: int, decisions: int, dtype: torch.dtype, form: str = "", gate_width: int = 1
) -> Case:
    """Args: form: of `FORMS`; empty: weights of the rows' type."""
    kept = torch.tensor([bool(decisions >> row & 1) for row in range(rows)], dtype=torch.bool)
    below = torch.tensor([THRESHOLD, float("nan"), -float("inf"), 0.1] * 2)[:rows]  # equal to the threshold: skipped
    x, gate = (cases.matrix(rows, size, dtype, "cpu", seed) for size, seed in ((inner, 1), (gate_width, 2)))
    weight, other = (
        codes(inner, width, form, dtype, seed) if form else cases.matrix(inner, width, dtype, "cpu", seed) / inner**0.5
        for seed in (3, 4)
    )
    x[~kept], gate[~kept] = float("nan"), float("nan")
    score = torch.where(kept, torch.rand(rows) + 0.6, below)
    return Case(x, score, kept, weight, other, cases.matrix(rows, width, dtype, "cpu", 5), gate)


@pytest.fixture(scope="module")
def kernels() -> Iterator[cases.GuardedKernels]:
    made = cases.GuardedKernels(emulated_library())
    yield made
    made.verify()


@pytest.fixture(params=ORDERS)
def ordered(request: pytest.FixtureRequest, kernels: cases.GuardedKernels) -> Iterator[cases.GuardedKernels]:
    """The kernels, run in an order of threads and blocks."""
    kernels._library.emulation_set_order(ORDERS[request.param], 1)
    yield kernels
    kernels._library.emulation_set_order(ORDERS["forward"], 1)


def linear(kernels: cases.GuardedKernels, one: Case) -> Tensor:
    return kernels.skip_linear(one.x, one.score, one.threshold, one.weight)


def gate_up(kernels: cases.GuardedKernels, one: Case) -> Tensor:
    return kernels.skip_gate_up(one.x, one.score, one.threshold, one.weight, one.other)


def linear_add(kernels: cases.GuardedKernels, one: Case) -> Tensor:
    return kernels.skip_linear_add(one.residual, one.x, one.gate, one.score, one.threshold, one.weight)


def untouched(rows: Tensor) -> bool:
    """Whether rows have only what was in memory before."""
    return bool((rows.view(torch.uint8) == cases.GARBAGE).all())


def product(x: Tensor, weight: Weight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x W in float64, and how far a float32 sum that is rounded to the type may be from it."""
    whole = exact(weight)
    wanted, roundings = x.double() @ whole, len(whole) + 2 * isinstance(weight, Codes)
    return wanted, (x.double().abs() @ whole.abs()) * SUM_ROUNDING * roundings + wanted.abs() * ROUNDING[dtype]


def check(one: Case, kernels: cases.GuardedKernels) -> list[Tensor]:
    """All three against the rule. Returns: the results."""
    dtype = one.x.dtype
    unit = ROUNDING[dtype]
    found = linear(kernels, one)
    a, a_within = product(one.x[one.kept], one.weight, dtype)
    assert torch.equal(found[~one.kept], torch.zeros_like(found[~one.kept]))
    assert ((found[one.kept].double() - a).abs() <= a_within).all()

    hidden = gate_up(kernels, one)
    u, u_within = product(one.x[one.kept], one.other, dtype)
    silu = a * torch.sigmoid(a)
    # |silu'| is at most 1.1; then three more roundings: of the sigmoid, of silu and of the product.
    within = 1.1 * a_within * (u.abs() + u_within) + u_within * silu.abs() + 3.1 * unit * (silu * u).abs() + 2.0**-24
    assert untouched(hidden[~one.kept])
    assert ((hidden[one.kept].double() - silu * u).abs() <= within).all()

    added = linear_add(kernels, one)
    gated, before = one.gate[one.kept].double() * a, one.residual[one.kept].double()
    within = one.gate[one.kept].double().abs() * a_within + unit * (gated.abs() + (before + gated).abs() * 1.01)
    assert torch.equal(added[~one.kept], one.residual[~one.kept])
    assert ((added[one.kept].double() - before - gated).abs() <= within + 2.0**-24).all()
    return [found, hidden, added]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "width"), SIZES)
def test_sizes(kernels: cases.GuardedKernels, inner: int, width: int, dtype: torch.dtype) -> None:
    rows = 2 if inner * width > 100_000 else 8
    check(case(rows, inner, width, 0b01011010 if rows == 8 else 0b10, dtype, gate_width=width), kernels)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inner", "width"), CODE_SIZES)
def test_sizes_of_codes(kernels: cases.GuardedKernels, inner: int, width: int, form: str, dtype: torch.dtype) -> None:
    rows = 1 if inner * width > 100_000 else 8
    check(case(rows, inner, width, 0b01011010 if rows == 8 else 0b1, dtype, form, gate_width=width), kernels)


@pytest.mark.parametrize(
    ("dtype", "form"),
    [*((dtype, "") for dtype in cases.DTYPES), *((dtype, form) for dtype in HALVES for form in FORMS)],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_all_decisions(kernels: cases.GuardedKernels, rows: int, dtype: torch.dtype, form: str) -> None:
    for decisions in range(1 << rows):
        check(case(rows, 40, 32 if form else 24, decisions, dtype, form), kernels)


@pytest.mark.parametrize("form", ["", *FORMS])
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_the_same_bits_in_every_order(
    ordered: cases.GuardedKernels, kernels: cases.GuardedKernels, rows: int, form: str
) -> None:
    """Also without races: the emulation reports them."""
    one = case(rows, 136, 80 if form else 72, 0b1101, torch.float16, form)
    gate = gate_weight(len(one.residual[0]), form, torch.float16)
    results = [*check(one, ordered), ordered.gate_linear(one.residual, gate)]
    kernels._library.emulation_set_order(ORDERS["forward"], 1)
    for found, wanted in zip(results, [*check(one, kernels), kernels.gate_linear(one.residual, gate)], strict=True):
        cases.assert_same_bits(found, wanted, "out")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["int8", "e4m3"])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_code(kernels: cases.GuardedKernels, rows: int, form: str, dtype: torch.dtype) -> None:
    """All 256 of them (but E4M3's two NaN) are exact."""
    values = torch.arange(256).to(torch.uint8).view(FORMS[form][0])[None]
    values = values.where(values.float().isfinite(), torch.zeros((), dtype=values.dtype))
    ones = Codes(values, torch.ones(1, 256, dtype=dtype))
    score, bound = torch.ones(rows), torch.tensor(0.0)
    found = kernels.skip_linear(torch.ones(rows, 1, dtype=dtype), score, bound, ones)
    assert torch.equal(found.float(), values.float().expand(rows, 256))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_two_matrices_may_differ(kernels: cases.GuardedKernels, form: str) -> None:
    """A gate with a scale for each column beside an up projection in blocks, if both have codes of one type."""
    one = replace(case(2, 64, 48, 0b10, torch.float16, form), other=codes(64, 48, "int8 in blocks", torch.float16, 8))
    if form != "e4m3":
        check(one, kernels)
        return
    with pytest.raises(PluginLibraryError, match="no kernel for weights of this type"):
        gate_up(kernels, one)


def gate_weight(inner: int, form: str, dtype: torch.dtype) -> Weight:
    """Codes have float32 scales, one for each column."""
    if not form:
        return cases.matrix(inner, 96, dtype, "cpu", 6) / inner**0.5
    return codes(inner, 96, "int8" if form == "int8 in blocks" else form, torch.float32, 6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["", "int8", "e4m3"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_gates(kernels: cases.GuardedKernels, rows: int, form: str, dtype: torch.dtype) -> None:
    """Float32 in all rows: no rounding but the sum's."""
    x = cases.matrix(rows, 136, dtype, "cpu", 1)
    weight = gate_weight(136, form, dtype)
    wanted, within = product(x, weight, torch.float32)
    assert ((kernels.gate_linear(x, weight).double() - wanted).abs() <= within).all()


@pytest.fixture
def nowhere() -> Iterator[Tensor]:
    """Memory that nobody may read, as bytes: a read ends the process."""
    size = 1 << 16
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    no_access, private_and_anonymous = 0, 0x22
    sizes = ctypes.c_size_t(size), no_access, private_and_anonymous, -1, ctypes.c_long(0)
    start = libc.mmap(None, *sizes)
    assert start != ctypes.c_void_p(-1).value
    yield torch.frombuffer((ctypes.c_uint8 * size).from_address(start), dtype=torch.uint8)
    libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))


@pytest.mark.parametrize("form", ["", *FORMS])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_skipped_branch_reads_nothing(kernels: cases.GuardedKernels, nowhere: Tensor, rows: int, form: str) -> None:
    """Neither weights nor scales, rows or gates: in a process of its own, which a read would end."""
    one = case(rows, 64, 48, 0, torch.float16, form)

    def hidden(tensor: Tensor) -> Tensor:
        return nowhere[: tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)

    def hidden_matrix(weight: Weight) -> Weight:
        return Codes(hidden(weight.values), hidden(weight.scales)) if isinstance(weight, Codes) else hidden(weight)

    one = replace(
        one,
        x=hidden(one.x),
        gate=hidden(one.gate),
        weight=hidden_matrix(one.weight),
        other=hidden_matrix(one.other),
    )
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = torch.equal(linear(kernels, one), torch.zeros(rows, 48, dtype=torch.float16))
            right &= untouched(gate_up(kernels, one)) and torch.equal(linear_add(kernels, one), one.residual)
        finally:
            os._exit(not right)  # whatever is raised: the child must not go on as a second run of the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("form", ["", *FORMS])
def test_wide_rows(kernels: cases.GuardedKernels, form: str) -> None:
    check(case(1, 16_384, 16, 1, torch.bfloat16, form), kernels)


@pytest.mark.parametrize("offset", [1, 4])
def test_weights_that_are_not_aligned(kernels: cases.GuardedKernels, offset: int) -> None:
    one = case(2, 33, 48, 0b11, torch.float16)
    check(replace(one, weight=cases.matrix(33, 48, torch.float16, "cpu", 9, offset)), kernels)


def call(
    kernels: cases.GuardedKernels, name: str, tensors: list[Tensor], weight: Weight, sizes: list[int], out: Tensor
) -> int:
    """Returns: the status."""
    matrix = matrix_of(weight)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    status: int = getattr(kernels._library, f"gsx_skip_{name}")(
        *pointers,
        ctypes.byref(matrix),
        ctypes.c_int64(tensors[-1].numel()),
        *(ctypes.c_int64(size) for size in sizes),
        TYPES[out.dtype],
        ctypes.c_void_p(out.data_ptr()),
        None,
    )
    return status


def test_in_place(kernels: cases.GuardedKernels) -> None:
    """The result may take the residual's place."""
    one = case(3, 64, 48, 0b101, torch.float16)
    out = one.residual.clone()
    tensors = [out, one.x, one.gate, one.score, one.threshold]
    assert call(kernels, "linear_add", tensors, one.weight, [3, 64, 48, 1], out) == 0
    assert torch.equal(out, linear_add(kernels, one))


def test_refusals(kernels: cases.GuardedKernels) -> None:
    """Nothing is launched, and nothing is written."""
    one = case(2, 8, 8, 0b11, torch.float32)
    assert isinstance(one.weight, Tensor)
    out = torch.zeros(2, 8)
    tensors = [one.x, one.score, one.threshold]
    assert call(kernels, "linear", tensors, one.weight, [9, 8, 8], out) == TOO_LARGE
    assert call(kernels, "linear", [*tensors[:2], torch.zeros(3)], one.weight, [2, 8, 8], out) == BAD_SIZE
    assert call(kernels, "linear", tensors, one.weight, [-1, 8, 8], out) == BAD_SIZE
    assert call(kernels, "linear", tensors, one.weight, [2, 0, 8], out) == BAD_SIZE
    assert call(kernels, "linear", tensors, one.weight, [0, 8, 8], out) == 0
    moved = one.x.view(-1)[:15].view(torch.int16)[1:]
    assert call(kernels, "linear", [moved, *tensors[1:]], one.weight, [1, 7, 8], out) == MISALIGNED
    add = [one.residual, one.x, one.gate, *tensors[1:]]
    assert call(kernels, "linear_add", add, one.weight, [2, 8, 8, 3], out) == BAD_SIZE
    assert not out.any()


@pytest.mark.parametrize("form", FORMS)
def test_refused_codes(kernels: cases.GuardedKernels, form: str) -> None:
    """Rows of another type, columns that are not whole loads, blocks that a thread's rows do not fit."""
    one = case(2, 64, 48, 0b11, torch.float16, form)
    weight = one.weight
    assert isinstance(weight, Codes)
    out = torch.zeros(2, 48, dtype=torch.float16)
    tensors = [one.x, one.score, one.threshold]

    def status(weight: Codes, *sizes: int, out: Tensor = out) -> int:
        return call(kernels, "linear", tensors, weight, list(sizes), out)

    assert status(weight, 2, 64, 40) == BAD_SIZE
    assert status(weight, 2, 64, 48, out=out.float()) == UNKNOWN_WEIGHTS
    of_four = Codes(weight.values, torch.ones(16, 48, dtype=torch.float16))
    assert status(of_four, 2, 64, 48) == (UNKNOWN_WEIGHTS if form == "e4m3" else BAD_SIZE)
    assert status(Codes(weight.values, torch.ones(3, 48, dtype=torch.float16)), 2, 64, 48) != 0
    assert status(Codes(weight.values, torch.ones(100).half()[1:49][None]), 2, 64, 48) == MISALIGNED
    assert not out.any()
    with pytest.raises(PluginLibraryError, match="no kernel for weights of this type"):
        kernels.gate_linear(one.x, Codes(weight.values, torch.ones(8, 48)))
