"""What one call of an engine launches, waits for and copies, counted on plans that TensorRT-RTX builds without a GPU.

    python -m benchmarks.plans --work DIR                          2 layers, a quarter of Llama-3-8B's width
    python -m benchmarks.plans --work DIR --widths quarter full    and its full width: 16 GB of disk, 6 GB of memory

Heads are 128 wide in both, and the vocabulary is small, since it changes no count. Engines are for compute capability
8.9, fp16 and one sequence, with 1,024 columns of K and V. `tests/engines/test_plan.py` holds the counts of the quarter;
the last column says whether another width has the same, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bundles import exported
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.model import SHAPES, make_large, random_text
from gsx.workflows.inspect import EnginePlan, inspect
from gsx.workflows.quantize import Quantize
from gsx_engines.building.build import build
from gsx_engines.bundle.bundle import Bundle

CAPACITY = 1024
# `thin` is the full width but for the MLP, small enough for a test.
WIDTHS = {"quarter": "8b-quarter", "thin": "8b-thin", "full": "8b-width"}
# Model -> kind of its gates, and options of its export.
MODELS: dict[str, tuple[str | None, Mapping[str, Any]]] = {
    "dense": (None, {}),
    "gates": ("scalar", {}),
    "gates, int8-weights": ("scalar", {"quantize": Quantize("int8-weights", ("none",))}),
    "gates, fp8": ("scalar", {"quantize": Quantize("fp8", ("none",))}),
    "vector gates": ("vector", {}),
    "linear scores": ("linear", {}),
    "set of layers": (None, {"policy": "layers"}),
}
# Form -> its model, and options of its build.
FORMS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "dense, one token": ("dense", {}),
    "dense, step, TensorRT's attention": ("dense", {"step": 1, "plugins": "none"}),
    "dense, step": ("dense", {"step": 1}),
    "gates, one token": ("gates", {}),
    "gates, step": ("gates", {"step": 1}),
    "gates, step of 3": ("gates", {"step": 3}),
    "gates, int8-weights, step": ("gates, int8-weights", {"step": 1}),
    "gates, fp8, step": ("gates, fp8", {"step": 1}),
    "vector gates, step": ("vector gates", {"step": 1}),
    "vector gates, linear scores, step": ("linear scores", {"step": 1}),
    "set of layers, one token": ("set of layers", {}),
    "set of layers, step": ("set of layers", {"step": 1}),
}


def wide_bundle(path: Path, model: str, width: str = "quarter") -> Bundle:
    """Export one of the models, if it is not there yet. Args: model: a key of `MODELS`; width: one of `WIDTHS`."""
    gate, options = MODELS[model]
    shape = WIDTHS[width]
    checkpoint = path.with_name(f"{path.name}.model")
    if not path.exists():
        make_large(checkpoint, shape, gate)
    calibrated: dict[str, Any] = {}
    if gate is not None:
        text = random_text(path.with_name(f"{path.name}.txt"), SHAPES[shape]["vocab_size"], words=800)
        calibrated = {"budget": 0.5, "calibration": text, "calibration_tokens": 256}
    return exported(path, checkpoint, precision="fp16", **calibrated, **options)


def plan_of(bundle: Bundle, **options: Any) -> EnginePlan:
    """The plan of engines that are built for a step or, without one, for single tokens."""
    profiles = () if "step" in options else ("decode:1",)
    name, _ = build(bundle, targets=["8.9"], context=CAPACITY, profiles=profiles, **options)
    return next(plan for plan in inspect(bundle.directory, plan=True).plans or () if plan.engines == name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build each form at each width, and print a table."""
    quick = {"widths": ["quarter"], "forms": ["dense, step"]}
    made = parser("plans", __doc__, work="models, exports and engines", quick=quick)
    made.add_argument("--widths", nargs="+", choices=WIDTHS, default=["quarter"], help="(default: quarter)")
    made.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help="(default: all)")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    lines = Table(
        *("form", "width", "kernels", "of each layer", "waits for the GPU", "shapes on the host"),
        *("copies from and to the host", "K/V window copies", "CUDA graph", f"as {args.widths[0]}"),
    )
    for form in args.forms:
        model, options = FORMS[form]
        first: EnginePlan | None = None
        for width in args.widths:
            plan = plan_of(wide_bundle(args.work / f"{model} {width}".replace(" ", "-"), model, width), **options)
            total, first = plan.total, first or plan
            lines.row(
                form,
                width,
                total.kernels,
                ", ".join(str(counts.kernels) for layer, counts in plan.layers.items() if layer != "-"),
                total.host_syncs,
                total.shape_calls,
                total.to_host + total.to_device,
                total.window_copies,
                "yes" if plan.capturable else "no",
                None if plan is first else "the same" if plan.layers == first.layers else "differs",
            )


if __name__ == "__main__":
    main()
