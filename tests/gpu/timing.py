"""How fast the kernels are, next to a device copy of the same run.

Every figure is a median over many replays of a CUDA graph with many calls in turn, divided by the number of calls. The
calls use rotating buffers that together exceed L2. Therefore Python's launch gaps do not count, a graph's start counts
little, and no call finds its data in L2. Bytes are those that must move: each input is read, each output written once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gsx_plugins.cuda import Kernels
from tests.gpu.rows import Row, goal_row

WIDTH = 4096
BUDGET = 0.7
ROWS = (8192, 16_384, 32_768, 65_536)
DTYPE = torch.bfloat16
# Goals of the issue "TensorRT: the ops as plugins in CUDA".
MIN_COPY_SHARE = 0.85
MAX_SELECT_US = {8192: 10.0, 131_072: 40.0}
MIN_CHAIN_SPEEDUP = 3.0

_REPLAYS = 50
_CALLS = 32  # smallest number in a graph, whose start takes as long as a small selection
_SMALL = 2.0**-10  # of gates, so that repeated additions in place stay finite
_L2_MULTIPLE = 4
_MAX_SETS = 64

Call = Callable[[], object]


def sets_for(bytes_per_call: int, l2_bytes: int) -> int:
    """How many sets of buffers rotate, so that a call's data has left L2 when its turn comes again."""
    return max(2, min(_MAX_SETS, -(-_L2_MULTIPLE * l2_bytes // max(1, bytes_per_call))))


def median_us(calls: Sequence[Call]) -> float:
    """Microseconds of one call, the calls taken in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-_CALLS // len(calls))
    held: list[object] = [None] * len(calls)  # results kept for a round, so that their buffers rotate too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for at, call in enumerate(calls):
                held[at] = call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * len(calls)))
    del held
    return statistics.median(times)


def measurements(kernels: Kernels) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """(name, measurement) of all figures of the issue that concern kernels."""
    properties = torch.cuda.get_device_properties(0)
    l2_bytes = properties.L2_cache_size
    found = f"{properties.name}, {properties.multi_processor_count} SMs, L2 {l2_bytes >> 20} MB"
    yield "GPU", lambda: [Row("GPU", found)]
    for n in (8192, 131_072):
        yield f"selection of {n}", lambda n=n: _selection_rows(kernels, n)
    for n in ROWS:
        yield f"rows of {n}", lambda n=n: _bandwidth_rows(kernels, n, l2_bytes)
    for n in (8192, 65_536):
        yield f"chain of {n}", lambda n=n: [_chain_row(kernels, n, l2_bytes)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(DTYPE)


def _places(n: int) -> Tensor:
    return torch.randperm(n, device="cuda")[: round(BUDGET * n)].sort().values


def _copy_gbs(size: int, l2_bytes: int) -> float:
    """Bandwidth of a device copy that moves `size` bytes (read and written together), GB/s."""
    count = sets_for(size, l2_bytes)
    buffers = torch.empty(count, 2, size // 2, dtype=torch.uint8, device="cuda").random_()
    pairs = [(buffers[i, 0], buffers[i, 1]) for i in range(count)]
    return size / median_us([lambda a=a, b=b: b.copy_(a) for a, b in pairs]) / 1000


def _bandwidth_rows(kernels: Kernels, n: int, l2_bytes: int) -> list[Row]:
    kept = round(BUDGET * n)
    row_bytes = WIDTH * DTYPE.itemsize
    rows = []

    def add(what: str, row_count: int, make: Callable[[], Call]) -> None:
        size = row_count * row_bytes
        calls = [make() for _ in range(sets_for(size, l2_bytes))]
        us = median_us(calls)
        del calls
        speed, copy = size / us / 1000, _copy_gbs(size, l2_bytes)
        found = f"{us:.1f} us, {speed:.0f} GB/s, {speed / copy:.1%} of a copy's {copy:.0f}"
        what = f"{what}, {n} x {WIDTH} {_spell(DTYPE)}, budget {BUDGET}"
        rows.append(goal_row(what, found, f"{MIN_COPY_SHARE:.0%}", speed >= MIN_COPY_SHARE * copy))

    def gather() -> Call:
        x, index = _random(n, WIDTH), _places(n)
        return lambda: kernels.gather_rows(x, index)

    def scatter(gate_width: int, *, in_place: bool) -> Callable[[], Call]:
        def make() -> Call:
            residual, rows, index = _random(n, WIDTH), _random(kept, WIDTH), _places(n)
            gate = _random(kept, gate_width) * _SMALL
            out = residual if in_place else torch.empty_like(residual)
            return lambda: kernels.gated_scatter_add(residual, rows, gate, index, out=out)

        return make

    add("row gather", 2 * kept, gather)
    add("gated scatter-add, scalar gate", 2 * n + kept, scatter(1, in_place=False))
    add("gated scatter-add, vector gate", 2 * n + 2 * kept, scatter(WIDTH, in_place=False))
    add("gated scatter-add in place, scalar gate", 3 * kept, scatter(1, in_place=True))
    return rows


def _selection_rows(kernels: Kernels, n: int) -> list[Row]:
    # Gate scores, whose leading bits are alike; their few hundred kilobytes are in L2 in real use too.
    scores = [torch.sigmoid(torch.randn(n, device="cuda")) for _ in range(8)]
    k, tau = torch.tensor([round(BUDGET * n)], device="cuda"), torch.tensor(0.45, device="cuda")
    best = median_us([lambda s=s: kernels.topk_select(s, k) for s in scores])
    above = median_us([lambda s=s: kernels.threshold_select(s, tau) for s in scores])
    theirs = median_us([lambda s=s: torch.topk(s, round(BUDGET * n)) for s in scores])
    limit = MAX_SELECT_US[n]
    found = f"{best:.1f} us (torch.topk {theirs:.1f})"
    return [
        goal_row(f"selection of the K best, N {n}", found, f"{limit:g} us", best <= limit),
        goal_row(f"selection by threshold, N {n}", f"{above:.1f} us", f"{limit:g} us", above <= limit),
    ]


def _chain_row(kernels: Kernels, n: int, l2_bytes: int) -> Row:
    """Select, gather, add again in place: ours against torch.topk, index_select and index_add_."""
    kept = round(BUDGET * n)
    count = sets_for(n * WIDTH * DTYPE.itemsize, l2_bytes)
    k = torch.tensor([kept], device="cuda")
    sets = [(torch.rand(n, device="cuda"), _random(n, WIDTH), _random(kept, 1) * _SMALL) for _ in range(count)]

    def ours(score: Tensor, x: Tensor, gate: Tensor) -> None:
        index = kernels.topk_select(score, k)[0][:kept]
        kernels.gated_scatter_add(x, kernels.gather_rows(x, index), gate, index, out=x)

    def theirs(score: Tensor, x: Tensor, gate: Tensor) -> None:
        index = torch.topk(score, kept).indices
        x.index_add_(0, index, gate * x.index_select(0, index))

    fast = median_us([lambda s=s: ours(*s) for s in sets])
    slow = median_us([lambda s=s: theirs(*s) for s in sets])
    found = f"{fast:.1f} us, torch {slow:.1f} us: {slow / fast:.2f} times as fast"
    what = f"select, gather, scatter, {n} x {WIDTH}"
    return goal_row(what, found, f"{MIN_CHAIN_SPEEDUP:g} times", slow >= MIN_CHAIN_SPEEDUP * fast)


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
