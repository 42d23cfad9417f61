"""What a decode step on a GPU must cost: bytes that move and launches, from counted plans. No GPU is needed.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --plan BUNDLE    with the kernels a layer of the bundle's own plans

One token of a model of Llama-3-8B's shape, with activations and K and V (of `--context` tokens before it, in buffers of
`--capacity` columns) in 16 bits.
The time of a form is

    bytes / bandwidth  +  kernels x gap  +  host syncs x sync

and nothing overlaps. Assumptions, none of them measured here:

- bandwidth is what a copy reaches: H200 4.3 TB/s, RTX 5090 1.62 TB/s, RTX 4090 0.92 TB/s; kernels reach 85 % of it;
- between two kernels of a CUDA graph 1.2 us pass, between launches from the host 2.75 us; a wait of the host for the
  GPU costs 25 us;
- a kept branch reads all its weights, a skipped one none; K and V projections always run (K/V policy `compute`), and so
  do vector gates, unless linear scores decide; scalar gates and norms weigh nothing;
- gsx's attention reads K and V of the columns in use, and none for a skipped branch; TensorRT's reads the whole buffers
  (`--capacity`) in every layer;
- a weight in 8 bits takes 1 byte, or 1.0625 with a 16-bit scale for 32 weights; those of the head too;
- activations stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Table, parse, parser, print_header
from gsx.workflows.inspect import inspect
from gsx_engines.bundle.bundle import open_bundle

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, MLP, VOCABULARY = 32, 4096, 32, 8, 128, 14336, 128256
BYTES, INT8_BLOCKS = 2.0, 1.0625  # of a weight
GPUS = {"H200": 4.3e12, "RTX 5090": 1.62e12, "RTX 4090": 0.92e12}
REACHED = 0.85
GRAPH_GAP, LAUNCH_GAP, SYNC = 1.2e-6, 2.75e-6, 25e-6
BUDGETS = (1.0, 0.7, 0.5)


@dataclass(frozen=True)
class Form:
    """A form of the engine, as counted.

    Args:
        kernels: of a layer.
        outside: kernels of a call besides.
        syncs: of a layer.
        copies: how often K and V of all columns are copied, each a read and a write.
        recorded: whether a CUDA graph holds it.
        skips: whether it skips at all.
        attends: whether attention is gsx's own.
        weights: bytes per weight.
        gates: bytes per weight of vector gates; 0 without them.
        scored: whether linear scores decide, so that only kept branches read their gates.
    """

    name: str
    kernels: float
    outside: int
    syncs: int = 0
    copies: int = 0
    recorded: bool = True
    skips: bool = True
    attends: bool = False
    weights: float = BYTES
    gates: float = 0.0
    scored: bool = False


# Counted on plans of TensorRT-RTX 1.7.1 for sm_89, fp16, one sequence (tests/engines/test_plan.py).
FORMS = (
    Form("dense", 11, 3, copies=1, skips=False),
    Form("dense, step, TensorRT's attention", 9, 5, skips=False),
    Form("dense, step", 9, 6, skips=False, attends=True),
    Form("gates, rows that the GPU counts (as before)", 28, 3, syncs=2, copies=1, recorded=False),
    Form("gates, step, TensorRT's attention (as before)", 10, 5),
    Form("gates, step", 8, 7, attends=True),
    Form("gates, step, INT8 weights in blocks", 9, 9, weights=INT8_BLOCKS, attends=True),
    Form("gates, step, FP8", 11, 9, weights=1.0, attends=True),
    Form("vector gates, step", 12, 7, gates=BYTES, attends=True),
    Form("vector gates, linear scores, step", 12, 7, gates=BYTES, scored=True, attends=True),
    Form("the same, INT8 weights in blocks", 13, 9, weights=INT8_BLOCKS, gates=1.0, scored=True, attends=True),
    Form("set of layers", 14, 2, copies=1),
    Form("set of layers, step", 12, 5, attends=True),
)
# Forms of attention that are gsx's kernel.
OWN_FORMS = ("predicated", "plugin")
DENSE = 2  # what others are compared with: the best dense form


def moved(form: Form, budget: float, context: int, capacity: int) -> float:
    """Bytes that a step reads and writes, with so many tokens before it in buffers of so many columns."""
    skippable = 2 * HIDDEN * HEADS * HEAD + 3 * HIDDEN * MLP
    always = 2 * HIDDEN * KV_HEADS * HEAD
    share = budget if form.skips else 1.0
    cache = 2 * KV_HEADS * HEAD * (context * share if form.attends else capacity)
    weights = (LAYERS * (skippable * share + always) + HIDDEN * VOCABULARY) * form.weights
    gates = LAYERS * 2 * HIDDEN * HIDDEN * form.gates * (share if form.scored else 1.0)
    return weights + gates + LAYERS * cache * (1 + 2 * form.copies) * BYTES


def seconds(form: Form, budget: float, context: int, capacity: int, bandwidth: float) -> float:
    """Time of a step."""
    kernels = LAYERS * form.kernels + form.outside
    gap = GRAPH_GAP if form.recorded else LAUNCH_GAP
    return moved(form, budget, context, capacity) / (REACHED * bandwidth) + kernels * gap + LAYERS * form.syncs * SYNC


def counted(bundle: Path) -> Sequence[Form]:
    """Forms from the plans of a bundle's engines; the mean of all layers but the first and the last one."""
    forms, engines = [], open_bundle(bundle).manifest.engines
    for plan in inspect(bundle, plan=True).plans or ():
        made = engines[plan.engines].graphs[plan.graph].forms
        layers = [one for layer, one in plan.layers.items() if layer != "-"]
        inner = layers[1:-1] or layers
        kernels = sum(one.kernels for one in inner) / len(inner)
        forms.append(
            Form(
                f"{plan.engines}, {plan.graph}, {plan.profile}",
                kernels,
                round(plan.total.kernels - kernels * len(layers)),
                syncs=round(plan.total.host_syncs / len(layers)),
                copies=round(plan.total.window_copies / len(layers) / 2),
                recorded=plan.capturable,
                attends={made.get(op) for op in ("GatheredAttention", "FullAttention")} <= {None, *OWN_FORMS},
            )
        )
    return forms


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    made = parser("step_cost", __doc__)
    made.add_argument("--context", type=int, default=1024, help="tokens before the step (default: 1024)")
    made.add_argument("--capacity", type=int, help="columns of the K/V buffers (default: as many as tokens)")
    made.add_argument("--plan", type=Path, metavar="BUNDLE", help="count the forms in a bundle's engines")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    capacity, dense = args.capacity or args.context, FORMS[DENSE]
    columns = ["form", "GB at 1, 0.7, 0.5", *(f"{name}: ms at 1, 0.7, 0.5; of the dense step" for name in GPUS)]
    table = Table(*columns)
    for form in (*FORMS, *(counted(args.plan) if args.plan else ())):
        budgets = BUDGETS if form.skips else BUDGETS[:1]
        cells = [", ".join(f"{moved(form, budget, args.context, capacity) / 1e9:.1f}" for budget in budgets)]
        for bandwidth in GPUS.values():
            times = [seconds(form, budget, args.context, capacity, bandwidth) for budget in budgets]
            whole = seconds(dense, 1.0, args.context, capacity, bandwidth)
            cells.append(", ".join(f"{time * 1e3:.2f}" for time in times) + f"; {times[-1] / whole:.2f}")
        table.row(form.name, *cells)


if __name__ == "__main__":
    main()
