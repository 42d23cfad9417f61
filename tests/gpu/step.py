"""The products of a decode step that skip, against cuBLAS and a device copy: do they decide what a step costs?

All times are of CUDA graphs, at the shapes of Llama-3-8B in 16 bits: a product whose rows are kept, one whose rows are
skipped, and the products of a whole step. Needs PyTorch and nvcc alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gsx_plugins.cuda import Kernels
from tests.gpu.rows import Row, goal_row
from tests.gpu.timing import median_us, sets_for

HIDDEN, KV, MLP, LAYERS = 4096, 1024, 14336, 32
DTYPE = torch.bfloat16
BUDGETS = (1.0, 0.7, 0.5)
# Goals of the issue: of a copy's bandwidth, of a skipped branch in microseconds, and of the dense step at budget 0.5.
MIN_COPY_SHARE, MAX_SKIP_US, MAX_HALF_SHARE = 0.85, 3.0, 0.62
# Up to four roundings to 8 bits, 2^-9 each (of gate and up projection, of SiLU, of their product), the first of which
# SiLU's slope stretches: of the largest result, and of the largest summand where opposite ones may cancel.
ROUNDING = 5 * 2.0**-9


def step_checks(kernels: Kernels, device: str) -> list[Row]:
    """The kernels against float64, kept and skipped rows together."""
    rows = []
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for count in (1, 3, 8):
            x, residual, gate = (_random(count, width, dtype=dtype, device=device) for width in (128, 72, 1))
            weight, up = (_random(128, 72, dtype=dtype, device=device) / 12 for _ in range(2))
            score, limit = torch.arange(count, device=device) % 2 + 0.25, torch.tensor(1.0, device=device)
            kept = (score > limit)[:, None]
            product, other = (x.double() @ matrix.double() for matrix in (weight, up))
            wanted = {
                "linear": product * kept,
                "gate_up": product * product.sigmoid() * other * kept,
                "linear_add": residual.double() + gate.double() * product * kept,
            }
            found = {
                "linear": kernels.skip_linear(x, score, limit, weight),
                "gate_up": kernels.skip_gate_up(x, score, limit, weight, up).where(kept, torch.zeros((), dtype=dtype)),
                "linear_add": kernels.skip_linear_add(residual, x, gate, score, limit, weight),
            }
            scale = {name: one.abs().max().clamp(1) for name, one in wanted.items()}
            scale["linear_add"] = torch.maximum(residual.abs().max(), (gate * product).abs().max()).clamp(1)
            far = max(float((found[name].double() - one).abs().max() / scale[name]) for name, one in wanted.items())
            rows.append((f"{dtype}, {count} rows", far))
    worst = max(rows, key=lambda row: row[1])
    return [
        goal_row(
            "products that skip, against float64",
            f"off by {worst[1]:.1e} at most ({worst[0]})",
            f"{ROUNDING:.1e}",
            worst[1] <= ROUNDING,
        )
    ]


def step_measurements(kernels: Kernels) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """(name, measurement), the ones that decide most first."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    yield "a skipped branch", lambda: [_skipped(kernels)]
    for count in (1, 4, 8):
        yield f"products of {count} rows", partial(_products, kernels, count, l2_bytes)
    yield "products of a step", lambda: _steps(kernels)


def _random(*shape: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _scores(count: int, kept: bool) -> tuple[Tensor, Tensor]:
    return torch.full((count,), float(kept), device="cuda"), torch.tensor(0.5, device="cuda")


def _skipped(kernels: Kernels) -> Row:
    """Both kernels of an MLP whose rows are skipped, in turn."""
    x, hidden, gate = _random(1, HIDDEN), _random(1, MLP), _random(1, 1)
    wide, narrow = _random(HIDDEN, MLP), _random(MLP, HIDDEN)
    decision = _scores(1, kept=False)
    us = median_us(
        [
            lambda: kernels.skip_gate_up(x, *decision, wide, wide),
            lambda: kernels.skip_linear_add(x, hidden, gate, *decision, narrow),
        ]
    )
    return goal_row("a skipped MLP, both kernels", f"{2 * us:.2f} us", f"{MAX_SKIP_US:g} us", 2 * us <= MAX_SKIP_US)


def _products(kernels: Kernels, count: int, l2_bytes: int) -> list[Row]:
    rows = []
    decision = _scores(count, kept=True)
    for name, inner, width in (("q and o", HIDDEN, HIDDEN), ("down", MLP, HIDDEN), ("gate and up", HIDDEN, MLP)):
        matrices = 2 if inner == HIDDEN and width == MLP else 1
        size = matrices * inner * width * DTYPE.itemsize
        sets = [[_random(inner, width) for _ in range(matrices)] for _ in range(sets_for(size, l2_bytes))]
        x = _random(count, inner)
        ours = kernels.skip_gate_up if matrices == 2 else kernels.skip_linear
        us = median_us([partial(ours, x, *decision, *one) for one in sets])
        theirs = median_us([lambda x=x, one=one: [x @ weight for weight in one] for one in sets])
        pairs = [(one[0], torch.empty_like(one[0])) for one in sets]
        copied = 2 * inner * width * DTYPE.itemsize / median_us([lambda a=a, b=b: b.copy_(a) for a, b in pairs])
        share = size / us / copied
        found = f"{us:.1f} us, {share:.0%} of a copy's {copied / 1000:.0f} GB/s; cuBLAS {theirs:.1f} us"
        rows.append(goal_row(f"{name}, {count} rows kept", found, f"{MIN_COPY_SHARE:.0%}", share >= MIN_COPY_SHARE))
    return rows


def _steps(kernels: Kernels) -> list[Row]:
    """All products of a token's step but the head's, in one CUDA graph; what is not a product is left out of both."""
    free, _ = torch.cuda.mem_get_info()
    layer = (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * MLP) * DTYPE.itemsize
    layers = min(LAYERS, int(free * 0.8) // layer)
    made = [
        [
            _random(*shape) / 64
            for shape in (
                (HIDDEN, HIDDEN),
                (HIDDEN, 2 * KV),
                (HIDDEN, HIDDEN),
                (HIDDEN, MLP),
                (HIDDEN, MLP),
                (MLP, HIDDEN),
            )
        ]
        for _ in range(layers)
    ]
    x, gate = _random(1, HIDDEN), _random(1, 1)
    limit = torch.tensor(0.5, device="cuda")

    def dense() -> Tensor:
        h = x
        for q, kv, o, g, u, down in made:
            _ = h @ kv
            h = h + (h @ q) @ o
            h = h + (torch.nn.functional.silu(h @ g) * (h @ u)) @ down
        return h

    def skipping(scores: Tensor) -> Tensor:
        h = x
        for number, (q, kv, o, g, u, down) in enumerate(made):
            attention, mlp = scores[2 * number : 2 * number + 1], scores[2 * number + 1 : 2 * number + 2]
            _ = h @ kv
            h = kernels.skip_linear_add(h, kernels.skip_linear(h, attention, limit, q), gate, attention, limit, o)
            h = kernels.skip_linear_add(h, kernels.skip_gate_up(h, mlp, limit, g, u), gate, mlp, limit, down)
        return h

    whole = median_us([dense])
    rows = [Row(f"products of a step, {layers} layers, cuBLAS, dense", f"{whole:.0f} us")]
    for budget in BUDGETS:
        kept = torch.rand(2 * layers, device="cuda").argsort() < round(budget * 2 * layers)
        us = median_us([partial(skipping, kept.float())])
        what = f"products of a step, {layers} layers, budget {budget:g}"
        found = f"{us:.0f} us, {us / whole:.2f} of dense"
        rows.append(
            goal_row(what, found, f"{MAX_HALF_SHARE:g}", us <= MAX_HALF_SHARE * whole)
            if budget == 0.5
            else Row(what, found)
        )
    return rows
