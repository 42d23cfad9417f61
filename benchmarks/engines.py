"""What building TensorRT-RTX engines costs in time, memory and size, and what runs in 8 bits.

    python -m benchmarks.engines --work DIR --model example    the example model in each precision
    python -m benchmarks.engines --work DIR --model 8bit       INT8 and FP8 against fp16: that model, and one of 82 M
    python -m benchmarks.engines --work DIR --model 1b         1.1 B parameters; needs 8 GB of memory

An engine is built in a process of its own; its peak is the kernel's account of that process (`VmHWM`, which counts
pages of mapped files too), and its seconds are those of the build without starting. Both are in `engine.json`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.bundles import EXAMPLE, GSX, Workshop, exported
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.model import make_large
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle

BUDGET, CALIBRATION_TOKENS = 0.7, 2048
# Name, bundle, and further options of `gsx build`.
Build = tuple[str, Bundle, Sequence[str]]


def of_example(work: Path, precisions: Sequence[str]) -> Iterator[Build]:
    """The example model in each precision, with masks and with plugins."""
    for precision in precisions:
        options: dict[str, Any] = {"budget": BUDGET, "precision": precision}
        bundle = exported(work / f"example-{precision}", EXAMPLE, **options)
        yield f"example, masks, {precision}", bundle, ("--plugins", "none")
        yield f"example, plugins, {precision}", bundle, ()


def in_8_bits(work: Path) -> Iterator[Build]:
    """The example model and the benchmark model in fp16, INT8 and FP8, with masks and with plugins."""
    workshop = Workshop.of(work, "small")
    for name, model, text in (("example", EXAMPLE, None), ("82 M", workshop.model("scalar"), workshop.text())):
        forms = {"fp16": None, "int8": Quantize("int8"), "fp8": Quantize("fp8")}
        for scheme, quantize in forms.items():
            options: dict[str, Any] = {"budget": BUDGET, "precision": "fp16", "calibration": text, "quantize": quantize}
            path = work / f"{name.replace(' ', '')}-{scheme}"
            bundle = exported(path, model, calibration_tokens=CALIBRATION_TOKENS, **options)
            for ops, plugins in (("masks", "none"), ("plugins", "auto")):
                yield f"{name}, {ops}, {scheme}", bundle, ("--plugins", plugins, "--target", "8.9")


def of_1b(work: Path) -> Iterator[Build]:
    """1.1 B parameters, dense, in fp16."""
    model = work / "model-1b"
    if not model.exists():
        make_large(model)
    yield "1.1 B, dense, fp16", exported(work / "bundle-1b", model, precision="fp16"), ()


def main(arguments: Sequence[str] | None = None) -> None:
    """Build each engine, and print a table."""
    quick = {"model": "example", "precisions": ["fp32"]}
    made = parser("engines", __doc__, work="models and exports (12 GB with 1b)", quick=quick)
    made.add_argument("--model", choices=["example", "8bit", "1b"], default="example", help="(default: example)")
    precisions = ["fp32", "fp16", "bf16"]
    made.add_argument("--precisions", nargs="+", choices=precisions, default=precisions, help="of the example model")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    builds = {"example": lambda: of_example(args.work, args.precisions), "8bit": lambda: in_8_bits(args.work)}
    builds["1b"] = lambda: of_1b(args.work)
    heads = ("engine", "ops", "weights MB", "engine MB", "build s", "whole command s", "peak MB", "peak / weights")
    lines = Table(*heads, "products")
    for name, bundle, options in builds[args.model]():
        weights = bundle.manifest.weights.size_bytes
        started = perf_counter()
        command = [*GSX, "build", str(bundle.directory), "--json", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = perf_counter() - started
        graph = json.loads(done.stdout)["graphs"]["model"]
        lines.row(
            name,
            ", ".join(sorted(set(graph["forms"].values()))) or "none",
            f"{weights / 1e6:.1f}",
            f"{graph['size_bytes'] / 1e6:.1f}",
            f"{graph['build_seconds']:.1f}",
            f"{seconds:.1f}",
            f"{graph['peak_bytes'] / 1e6:.0f}",
            f"{graph['peak_bytes'] / weights:.2f}",
            ", ".join(f"{count} {kind}" for kind, count in sorted(graph["products"].items())),
        )


if __name__ == "__main__":
    main()
