"""Prefill of Llama-3-8B's shape in PyTorch with the kernels, against what its FLOPs predict; no package but PyTorch."""

from __future__ import annotations

from benchmarks import gpu_prefill
from gsx_plugins.cuda import bind
from tests.gpu.rows import Row, goal_row


def prefill_rows() -> list[Row]:
    """Prefill of Llama-3-8B's shape: time against FLOPs."""
    bind()
    figures = gpu_prefill.measure(gpu_prefill.LLAMA_3_8B, 4096, (1.0, 0.7, 0.5), 20, "cuda")
    what = "prefill, Llama-3-8B's shape, bf16, 4096 tokens"
    rows = [Row(f"{what}, dense", f"{figures[0].seconds * 1e3:.1f} ms")]
    for one in figures[1:]:
        found = f"{one.seconds * 1e3:.1f} ms, {one.time:.3f} of dense, FLOPs {one.work:.3f}: {one.apart:+.1%}"
        goal = f"{gpu_prefill.MAX_APART:.0%} apart"
        rows.append(goal_row(f"{what}, {one.form}", found, goal, one.reached) if one.saves else Row(what, found))
    return rows
