"""Attention of a decode step, run on the CPU by emulation of threads: `step_attention/kernel.h` is the rule.

Results are compared with float64, within what float32 sums and the roundings that the rule names may differ. What must
be exact is exact: rows and columns that are not to be touched, what is written into the cache besides RoPE's rounding,
and all bits in every order of threads and blocks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gsx_plugins.cuda import StepAttention
from gsx_plugins.errors import PluginLibraryError
from gsx_plugins.full_attention.op import full_attention
from tests.plugins import kernel_cases as cases
from tests.plugins.emulation import emulated_library
from tests.plugins.test_kernels import ORDERS
from tests.plugins.test_skip_branch import ROUNDING, untouched

HALVES = (torch.float16, torch.bfloat16)
FLOAT32 = 2.0**-24  # one rounding, relative
THRESHOLD = 0.5
COUNTERS = 4096


@dataclass(frozen=True)
class Sizes:
    """Of a step. Args: rotated: channels that RoPE turns, 0 for none; starts: `write_at` of each sequence."""

    starts: tuple[int, ...]
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    columns: int = 200
    rotated: int = 64
    window: int = 0
    softcap: float = 0.0

    @property
    def rows(self) -> int:
        return len(self.starts) * self.tokens


@dataclass(frozen=True)
class Case:
    """Operands, and the cache before the call. What nobody may read is NaN: queries that are skipped, columns that are
    not in use, or that no kept row sees. kept [N] bool."""

    sizes: Sizes
    of: StepAttention
    past: tuple[Tensor, Tensor]
    kept: Tensor


def case(sizes: Sizes, decisions: int, dtype: torch.dtype, *, hidden: float = 0.1, skips: bool = True) -> Case:
    """Args: decisions: a bit for each row; hidden: the share of older columns that a row does not see."""
    rng = cases.seeded(7)
    batch, rows, width, columns = len(sizes.starts), sizes.rows, sizes.width, sizes.columns
    kept = torch.tensor([bool(decisions >> row & 1) or not skips for row in range(rows)], dtype=torch.bool)
    starts = torch.tensor(sizes.starts, dtype=torch.int64)
    column = torch.arange(columns)
    place = starts[:, None] + torch.arange(sizes.tokens)  # [B, S]
    mask = (column <= place[..., None]) & (torch.rand(batch, sizes.tokens, columns, generator=rng) >= hidden)
    if sizes.window:
        mask &= column > place[..., None] - sizes.window
    mask |= column == place[..., None]
    query = cases.matrix(rows, sizes.heads * width, dtype, "cpu", 1)
    both = cases.matrix(rows, 2 * sizes.kv_heads * width, dtype, "cpu", 2)
    key, value = (both[:, : sizes.kv_heads * width], both[:, sizes.kv_heads * width :])  # as TensorRT gives them
    query[~kept] = float("nan")
    read = (mask & kept.view(batch, sizes.tokens, 1)).any(1) & (column < starts[:, None])  # [B, T]
    cache = [cases.matrix(batch * sizes.kv_heads * columns, width, dtype, "cpu", seed) for seed in (4, 5)]
    past = tuple(one.view(batch, sizes.kv_heads, columns, width) for one in cache)
    for one in past:
        one[(~read)[:, None].expand(-1, sizes.kv_heads, -1)] = float("nan")
    angles = torch.rand(rows, max(sizes.rotated // 2, 1), generator=rng) * 6
    bound = THRESHOLD + torch.arange(rows) * (rows in (3, 5, 8))  # one for all rows, or one for each
    below = torch.stack([bound, torch.full_like(bound, float("nan")), bound - float("inf"), bound - 0.4])
    score = torch.where(kept, bound + 0.4, below[torch.arange(rows) % 4, torch.arange(rows)])
    of = StepAttention(
        query,
        key,
        value,
        mask[:, None],
        starts,
        (angles.cos().to(dtype), angles.sin().to(dtype)) if sizes.rotated else None,
        score if skips else None,
        (bound if rows in (3, 5, 8) else torch.tensor(THRESHOLD)) if skips else None,
        sizes.window,
        0.0,
        sizes.softcap,
    )
    return Case(sizes, of, (past[0], past[1]), kept)


def turned(of: StepAttention, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows [N, heads, D] after RoPE in float64, and how far those of the kernel may be from these."""
    heads = rows.double().reshape(len(rows), -1, width)
    if of.tables is None:
        return heads, torch.zeros_like(heads)
    cos, sin = (table.double()[:, None] for table in of.tables)
    half = cos.shape[-1]
    low, high, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    out = torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)
    size = torch.cat([low.abs() + high.abs(), high.abs() + low.abs(), torch.zeros_like(rest)], -1)
    return out, ROUNDING[rows.dtype] * out.abs() * (size > 0) + 2 * FLOAT32 * size


def check(one: Case, kernels: cases.GuardedKernels, counters: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One call against the rule, in place. Returns: rows, and K and V of the cache."""
    of, sizes = one.of, one.sizes
    present = (one.past[0].clone(), one.past[1].clone())
    found = kernels.step_attention(of, present, counters=counters)
    kernels.verify()
    check_cache(one, present)
    assert untouched(found[~one.kept])
    group = sizes.heads // sizes.kv_heads
    query, apart = turned(of, of.query, sizes.width)
    scale = sizes.width**-0.5
    for row in one.kept.nonzero().flatten().tolist():
        sequence, token = divmod(row, sizes.tokens)
        seen = of.mask[sequence, 0, token].nonzero().flatten()
        key, value = (cache[sequence].double()[:, seen].repeat_interleave(group, 0) for cache in present)
        if len(seen) == 0:
            assert not found[row].any()
            continue
        scores = scale * (query[row][:, None] * key).sum(-1)
        # Of a score: the rounding of the query, the sum of D products, and a few operations.
        within = scale * (apart[row][:, None] * key.abs()).sum(-1)
        within += scale * (query[row].abs()[:, None] * key.abs()).sum(-1) * FLOAT32 * (sizes.width + 4)
        if sizes.softcap:
            scores = sizes.softcap * (scores / sizes.softcap).tanh()
            within += sizes.softcap * 8 * FLOAT32
        within += scores.abs() * 4 * FLOAT32
        weights = scores.softmax(-1)[..., None]
        wanted = (weights * value).sum(1)
        # A score's error changes weight and sum; sums of columns, and the powers of two.
        of_weights = torch.expm1(2 * within.amax(-1, keepdim=True)) + (len(seen) + 16) * 2 * FLOAT32
        limit = (weights * value.abs()).sum(1) * of_weights + wanted.abs() * ROUNDING[found.dtype] + 2.0**-24
        assert ((found[row].double().view(sizes.heads, -1) - wanted).abs() <= limit).all(), f"row {row}"
    return found, *present


def check_cache(one: Case, present: tuple[Tensor, Tensor]) -> None:
    """The step's columns have its keys, turned, and its values, whatever is skipped; all others are as before."""
    of, sizes = one.of, one.sizes
    key, within = (
        turned(of, of.key, sizes.width) if of.rotates[1] else turned(replace(of, tables=None), of.key, sizes.width)
    )
    value = of.value.reshape(sizes.rows, sizes.kv_heads, sizes.width)
    before = (one.past[0].clone(), one.past[1].clone())
    for row in range(sizes.rows):
        sequence, token = divmod(row, sizes.tokens)
        column = sizes.starts[sequence] + token
        if column < sizes.columns:
            assert ((present[0][sequence, :, column].double() - key[row]).abs() <= within[row]).all()
            before[0][sequence, :, column] = present[0][sequence, :, column]
            before[1][sequence, :, column] = value[row]
    for found, wanted in zip(present, before, strict=True):
        cases.assert_same_bits(found, wanted, "cache")


class PoisonedKernels(cases.GuardedKernels):
    """Scratch memory is NaN at first, so that a part that nobody wrote shows."""

    def empty(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        made = super().empty(like, shape, dtype)
        return made.fill_(0xFF) if dtype == torch.uint8 else made


@pytest.fixture(scope="module")
def kernels() -> Iterator[cases.GuardedKernels]:
    made = PoisonedKernels(emulated_library())
    yield made
    made.verify()


# Widths of heads and what RoPE turns of them, groups, one sequence and several, one token and several, the first
# column, a full cache, tokens behind its end, windows, caps. Some with one part of the cache, most with several.
SIZES = {
    "one token": Sizes((137,)),
    "the first column": Sizes((0,)),
    "the last column": Sizes((199,)),
    "a full tile": Sizes((128,)),
    "behind the end": Sizes((198,), tokens=4),
    "a draft": Sizes((70,), tokens=5),
    "a batch": Sizes((3, 199, 64, 17)),
    "drafts of a batch": Sizes((60, 5), tokens=4, kv_heads=4),
    "eight sequences": Sizes((0, 1, 2, 30, 63, 64, 65, 100), columns=120),
    "wide heads": Sizes((90,), heads=2, kv_heads=1, width=256, rotated=256),
    "heads of 128": Sizes((150,), heads=8, width=128, rotated=128, columns=300),
    "heads of 80, a part turned": Sizes((40,), heads=3, kv_heads=3, width=80, rotated=32),
    "heads of 96": Sizes((77,), width=96, rotated=96),
    "tiny heads": Sizes((77,), width=16, rotated=16),
    "no RoPE": Sizes((77,), rotated=0),
    "groups of 7": Sizes((33,), heads=14, tokens=2),
    "groups of 16, in chunks": Sizes((33,), heads=16, kv_heads=1, tokens=2),
    "a window": Sizes((170,), window=50),
    "a window of a draft": Sizes((170, 20), tokens=3, window=33),
    "a window of one": Sizes((130,), window=1),
    "a cap": Sizes((100,), softcap=3.0),
    "a small cache": Sizes((100, 20), columns=110),
    "many heads, whose caches are not cut": Sizes((100, 20), heads=136, kv_heads=136, width=8, rotated=0, columns=130),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", SIZES)
def test_sizes(kernels: cases.GuardedKernels, kind: str, dtype: torch.dtype) -> None:
    rows = SIZES[kind].rows
    check(case(SIZES[kind], 0b10110101 if rows > 1 else 1, dtype), kernels)


@pytest.mark.parametrize("tokens", [1, 3])
def test_all_decisions(kernels: cases.GuardedKernels, tokens: int) -> None:
    sizes = Sizes((90,), tokens=tokens, columns=130)
    for decisions in range(1 << tokens):
        check(case(sizes, decisions, torch.float16), kernels)
    check(case(sizes, 0, torch.float16, skips=False), kernels)


@pytest.mark.parametrize("kind", ["one token", "heads of 128", "a draft", "a small cache"])
def test_nobody_attends(kernels: cases.GuardedKernels, kind: str) -> None:
    """Without queries the cache gets the step's keys and values, and not a column is read."""
    one = case(SIZES[kind], 0, torch.float16, skips=False)
    present = (one.past[0].clone(), one.past[1].clone())
    counters = torch.zeros(COUNTERS, dtype=torch.int32)
    assert len(kernels.step_attention(replace(one.of, query=one.of.query[:0]), present, counters=counters)) == 0
    kernels.verify()
    check_cache(one, present)
    assert not counters.any()


def test_rows_that_see_nothing(kernels: cases.GuardedKernels) -> None:
    one = case(Sizes((90,), tokens=2), 0b11, torch.float16)
    one.of.mask[0, 0, 1] = False
    check(one, kernels)


def test_rows_do_not_touch_each_other(kernels: cases.GuardedKernels) -> None:
    """A value that is not a number, of a later token, which an earlier one does not see."""
    one = case(Sizes((90,), tokens=2), 0b11, torch.float16)
    present = [(one.past[0].clone(), one.past[1].clone()) for _ in range(2)]
    wanted = kernels.step_attention(one.of, present[0])
    one.of.value[1] = float("nan")
    found = kernels.step_attention(one.of, present[1])
    cases.assert_same_bits(found[0], wanted[0], "the earlier row")
    assert found[1].isnan().all()


def test_other_keys_than_turned_ones(kernels: cases.GuardedKernels) -> None:
    one = case(SIZES["a draft"], 0b10110, torch.bfloat16)
    check(replace(one, of=replace(one.of, rotates=(True, False))), kernels)


def test_as_the_op(kernels: cases.GuardedKernels) -> None:
    """The whole of what it takes the place of, in PyTorch."""
    one = case(Sizes((90, 30), tokens=2), 0, torch.bfloat16, hidden=0.0, skips=False)
    found, *present = check(one, kernels)
    query = turned(one.of, one.of.query, 64)[0].to(torch.bfloat16).view(2, 2, -1)
    cache = [torch.nan_to_num(one) for one in present]
    wanted = full_attention(query, cache[0], cache[1], one.of.mask, 4)
    torch.testing.assert_close(found, wanted.view(4, -1), rtol=2**-6, atol=2**-6)  # weights in bfloat16, there


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["heads of 128", "a draft", "groups of 16, in chunks"])
def test_the_same_bits_in_every_order(kernels: cases.GuardedKernels, kind: str, order: str) -> None:
    """Also without races: the emulation reports them. Counters are zeros again after each call."""
    one = case(SIZES[kind], 0b10110, torch.float16, skips=SIZES[kind].rows > 1)
    wanted = check(one, kernels)
    counters = torch.zeros(COUNTERS, dtype=torch.int32)
    kernels._library.emulation_set_order(ORDERS[order], 1)
    try:
        for _ in range(2):
            for found, want in zip(check(one, kernels, counters), wanted, strict=True):
                cases.assert_same_bits(found, want, "out")
    finally:
        kernels._library.emulation_set_order(ORDERS["forward"], 1)
    assert not counters.any()


def test_another_memory_for_the_cache(kernels: cases.GuardedKernels) -> None:
    one = case(SIZES["a batch"], 0b1011, torch.float16)
    wanted = check(one, kernels)
    present = tuple(torch.zeros_like(cache) for cache in one.past)
    before = [cache.clone() for cache in one.past]
    found = kernels.step_attention(one.of, one.past, (present[0], present[1]))
    for got, want in zip((found, *present, *one.past), (*wanted, *before), strict=True):
        cases.assert_same_bits(got, want, "out")


PAGE = mmap.PAGESIZE
NO_ACCESS = 0


@pytest.fixture
def guarded() -> Callable[[Tensor, int, int], Tensor]:
    """A copy of a tensor of whole pages, of which only some pages may be touched: anything else ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    held = []

    def copy(tensor: Tensor, first: int, end: int) -> Tensor:
        size = tensor.numel() * tensor.itemsize
        assert size % PAGE == 0
        memory = mmap.mmap(-1, size)
        held.append(memory)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        whole.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        start = whole.data_ptr()
        for page in range(size // PAGE):
            if not first <= page < end:
                assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
        return whole.view(tensor.dtype).view(tensor.shape)

    return copy


def in_a_child(works: Callable[[], bool]) -> bool:
    """Whether something holds in a process of its own, which an access that is not allowed ends."""
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = works()
        finally:
            os._exit(not right)  # whatever is raised: the child must not go on as a second run of the tests
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_skipped_branch_reads_nothing(
    kernels: cases.GuardedKernels, guarded: Callable[[Tensor, int, int], Tensor], tokens: int
) -> None:
    """Neither queries nor the cache, but for the step's own columns, which it writes."""
    sizes = Sizes((20,), tokens=tokens, heads=32, kv_heads=1, columns=64)  # a page: a row of queries, or 32 columns
    one = case(sizes, 0, torch.float16)
    query = guarded(one.of.query, 0, 0)
    past = tuple(guarded(cache, 0, 1) for cache in one.past)

    def skipped() -> bool:
        return untouched(kernels.step_attention(replace(one.of, query=query), (past[0], past[1])))

    assert in_a_child(skipped)
    # Behind the end nothing is written either.
    past = tuple(guarded(cache, 0, 0) for cache in one.past)
    one = replace(one, of=replace(one.of, write_at=torch.tensor([64])))
    assert in_a_child(skipped)


@pytest.mark.parametrize("window", [0, 20])
def test_only_columns_in_use_are_read(
    kernels: cases.GuardedKernels, guarded: Callable[[Tensor, int, int], Tensor], window: int
) -> None:
    """Of 128 columns, 32 in a page, those up to the 84th; with a window those of its last 20."""
    one = case(Sizes((84,), kv_heads=1, columns=128, window=window), 1, torch.float16)
    wanted = check(one, kernels)[0]
    past = tuple(guarded(cache, 2 if window else 0, 3) for cache in one.past)
    assert in_a_child(lambda: torch.equal(kernels.step_attention(one.of, (past[0], past[1])), wanted))


REFUSED: dict[str, tuple[Callable[[StepAttention], StepAttention], str]] = {
    "float32": (
        lambda of: replace(of, query=of.query.float(), key=of.key.float(), value=of.value.float()),
        "element type",
    ),
    "heads that no K/V head has": (lambda of: replace(of, query=of.query[:, :192].contiguous()), "sizes do not fit"),
    "thresholds": (lambda of: replace(of, threshold=torch.zeros(3)), "sizes do not fit"),
    "odd RoPE": (
        lambda of: replace(of, tables=(of.query[:, :12].contiguous(), of.query[:, :12].contiguous())),
        "sizes do not fit",
    ),
    "a wrong alignment": (
        lambda of: replace(of, query=cases.matrix(2, 256, torch.float16, "cpu", 1, 4)),
        "not aligned",
    ),
    "fewer queries than tokens": (lambda of: replace(of, query=of.query[:1]), "sizes do not fit"),
    "a window below 0": (lambda of: replace(of, window=-1), "sizes do not fit"),
    "too many rows": (
        lambda of: replace(of, mask=torch.zeros(1, 1, 9, 200, dtype=torch.bool)),
        "more than",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kernels: cases.GuardedKernels, kind: str) -> None:
    """Nothing is launched, and nothing is written."""
    change, reason = REFUSED[kind]
    one = case(Sizes((50,), tokens=2), 0b11, torch.float16)
    present = (one.past[0].clone(), one.past[1].clone())
    with pytest.raises(PluginLibraryError, match=reason):
        kernels.step_attention(change(one.of), present)
    for found, before in zip(present, one.past, strict=True):
        cases.assert_same_bits(found, before, "cache")


def test_no_rows(kernels: cases.GuardedKernels) -> None:
    one = case(Sizes(()), 0, torch.float16)
    assert kernels.step_attention(one.of, one.past).shape == (0, 256)
