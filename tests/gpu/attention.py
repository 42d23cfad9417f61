"""The attention of a decode step: against float64, and its time at Llama-3-8B's shapes beside PyTorch's and a copy.

Times are of CUDA graphs. Needs PyTorch and nvcc alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gsx_plugins.cuda import Kernels, StepAttention
from tests.gpu.rows import Row, goal_row
from tests.gpu.timing import median_us, sets_for

HEADS, KV_HEADS, WIDTH, COLUMNS, COUNTERS = 32, 8, 128, 4096, 4096
DTYPE = torch.bfloat16
# Of a copy's bandwidth, and of a branch that is skipped, in microseconds: the goals for products.
MIN_COPY_SHARE, MAX_SKIP_US = 0.85, 3.0
# One rounding of a query and one of the result, 2^-9 each, of values up to 4; and a score's change, which the softmax
# passes on.
APART = 2.0**-5


def attention_checks(kernels: Kernels, device: str) -> list[Row]:
    """Kept rows against PyTorch in float64: one sequence and a batch, one token and a draft, in place."""
    worst = (0.0, "")
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for starts, tokens, width in (((300,), 1, 128), ((300,), 3, 64), ((0, 17, 299, 130), 2, 64), ((210,), 1, 256)):
            of, past = _step(starts, tokens, 8, 2, width, 320, dtype, device)
            found = kernels.step_attention(of, past)
            wanted = _in_float64(of, past, tokens)
            far = float((found.double() - wanted).abs().max())
            worst = max(worst, (far, f"{dtype}, {len(starts)} x {tokens} rows, heads of {width}"))
    return [
        goal_row(
            "attention of a step, against float64",
            f"off by {worst[0]:.1e} at most ({worst[1]})",
            f"{APART:.1e}",
            worst[0] <= APART,
        )
    ]


def attention_measurements(kernels: Kernels) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """(name, measurement): kept, of a short text, skipped."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    yield "attention of a step", partial(_times, kernels, l2_bytes)


def _step(
    starts: tuple[int, ...],
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[StepAttention, tuple[Tensor, Tensor]]:
    """Random operands, without RoPE, all rows kept, and the cache before the call."""
    rows = len(starts) * tokens
    write_at = torch.tensor(starts, device=device)
    place = write_at[:, None, None] + torch.arange(tokens, device=device)[:, None]
    mask = torch.arange(columns, device=device) <= place

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    of = StepAttention(
        random(rows, heads * width),
        random(rows, kv_heads * width),
        random(rows, kv_heads * width),
        mask[:, None].contiguous(),
        write_at,
        score=torch.ones(rows, device=device),
        threshold=torch.tensor(0.5, device=device),
    )
    cache = (len(starts), kv_heads, columns, width)
    return of, (random(*cache), random(*cache))


def _in_float64(of: StepAttention, present: tuple[Tensor, Tensor], tokens: int) -> Tensor:
    key, value = (cache.double().repeat_interleave(of.query.shape[1] // cache[0, :, 0].numel(), 1) for cache in present)
    query = of.query.double().view(len(key), tokens, key.shape[1], -1).transpose(1, 2)
    rows = F.scaled_dot_product_attention(query, key, value, attn_mask=of.mask)
    return rows.transpose(1, 2).reshape(len(of.query), -1)


def _times(kernels: Kernels, l2_bytes: int) -> list[Row]:
    size = 2 * KV_HEADS * COLUMNS * WIDTH * DTYPE.itemsize
    made = [
        _step((COLUMNS - 1,), 1, HEADS, KV_HEADS, WIDTH, COLUMNS, DTYPE, "cuda")
        for _ in range(sets_for(size, l2_bytes))
    ]
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")

    def ours(change: Callable[[StepAttention], StepAttention]) -> float:
        calls = [(change(of), past) for of, past in made]
        return median_us(
            [lambda of=of, past=past: kernels.step_attention(of, past, counters=counters) for of, past in calls]
        )

    def theirs(of: StepAttention, past: tuple[Tensor, Tensor]) -> Tensor:
        query = of.query.view(1, HEADS, 1, WIDTH)
        return F.scaled_dot_product_attention(query, *past, enable_gqa=True)

    kept = ours(lambda of: of)
    copies = [(past[0], torch.empty_like(past[0])) for _, past in made]
    copied = size / median_us([lambda a=a, b=b: b.copy_(a) for a, b in copies])
    share = size / kept / copied
    beside = median_us([partial(theirs, of, past) for of, past in made])
    short = ours(lambda of: replace(of, write_at=torch.full_like(of.write_at, COLUMNS // 4)))
    skipped = ours(lambda of: replace(of, score=torch.zeros_like(of.score)) if of.score is not None else of)
    found = f"{kept:.1f} us, {share:.0%} of a copy's {copied / 1000:.0f} GB/s; PyTorch's {beside:.1f} us"
    return [
        goal_row(f"attention, {COLUMNS} columns", found, f"{MIN_COPY_SHARE:.0%}", share >= MIN_COPY_SHARE),
        Row(f"attention, {COLUMNS // 4} of {COLUMNS} columns in use", f"{short:.1f} us"),
        goal_row("attention, skipped", f"{skipped:.2f} us", f"{MAX_SKIP_US:g} us", skipped <= MAX_SKIP_US),
    ]
