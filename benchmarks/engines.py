"""What building TensorRT-RTX engines takes, in time, memory and size, and what runs in 8 bits.

    python -m benchmarks.engines --work DIR                  1.1 B parameters; needs 12 GB of disk and 8 GB of memory
    python -m benchmarks.engines --work DIR --shape small    the example model in each precision
    python -m benchmarks.engines --work DIR --shape 8bit     INT8 and FP8 beside fp16: that model, and one of 82 M

An engine is built in a process of its own; its peak is the kernel's account of that process (`VmHWM`, which counts
pages of mapped files too), and its seconds are those of the build alone. Both stand in `engine.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.model import SHAPES, make_large, make_model, random_text

EXAMPLE = Path(__file__).parent.parent / "examples" / "model"


def command(*arguments: str) -> str:
    """Run the command line of this environment; returns what it printed."""
    code = "from gsx.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def bundles(work: Path, shape: str) -> Iterator[tuple[str, Path, Sequence[str]]]:
    """Name, bundle and further options of `gsx build`, for each engine to build."""
    if shape == "1b":
        model, bundle = work / "model-1b", work / "bundle-1b"
        if not bundle.exists():
            if not model.exists():
                make_large(model)
            command("export", str(model), "-o", str(bundle), "--precision", "fp16")
        yield "1.1 B, dense, fp16", bundle, ()
        return
    if shape == "8bit":
        model, text = work / "model-82m", work / "text.txt"
        if not model.exists():
            make_model(model, "small", "scalar")
        random_text(text, SHAPES["small"]["vocab_size"])
        for name, source in (("example", EXAMPLE), ("82 M", model)):
            for scheme in ("fp16", "int8", "fp8"):
                bundle = work / f"{source.name}-{scheme}"
                if not bundle.exists():
                    options = ["--budget", "0.7", "--precision", "fp16", "--calibration-tokens", "2048"]
                    options += ["--calibration", str(text)] if source == model else []
                    options += [] if scheme == "fp16" else [f"--{scheme}"]
                    command("export", str(source), "-o", str(bundle), *options)
                for ops, plugins in (("masks", "none"), ("plugins", "auto")):
                    yield f"{name}, {ops}, {scheme}", bundle, ("--plugins", plugins, "--target", "8.9")
        return
    for precision in ("fp32", "fp16", "bf16"):
        bundle = work / f"example-{precision}"
        if not bundle.exists():
            command("export", str(EXAMPLE), "-o", str(bundle), "--budget", "0.7", "--precision", precision)
        yield f"example, masks, {precision}", bundle, ("--plugins", "none")
        yield f"example, plugins, {precision}", bundle, ()


def main() -> None:
    """Build each engine and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=["small", "1b", "8bit"], default="1b")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| engine | ops | weights MB | engine MB | build s | whole command s | peak MB | peak / weights | products |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, bundle, options in bundles(args.work, args.shape):
        weights = json.loads((bundle / "gsx.json").read_text())["weights"]["size_bytes"]
        started = time.perf_counter()
        entry = json.loads(command("build", str(bundle), "--json", *options))
        seconds = time.perf_counter() - started
        made = entry["graphs"]["model"]
        print(
            f"| {name} | {', '.join(sorted(set(made['forms'].values()))) or 'none'} | {weights / 1e6:.1f} "
            f"| {made['size_bytes'] / 1e6:.1f} | {made['build_seconds']:.1f} | {seconds:.1f} "
            f"| {made['peak_bytes'] / 1e6:.0f} | {made['peak_bytes'] / weights:.2f} "
            f"| {', '.join(f'{count} {kind}' for kind, count in sorted(made['products'].items()))} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
