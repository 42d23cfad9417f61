"""What building TensorRT-RTX engines takes, in time, memory and size: the example model, and 1.1 B parameters.

    python -m benchmarks.engines --work DIR        (needs 12 GB of disk and 8 GB of memory; --shape small needs little)

An engine is built in a process of its own; its peak is the kernel's account of that process (`ru_maxrss`, which counts
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

from benchmarks.model import make_large

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
    parser.add_argument("--shape", choices=["small", "1b"], default="1b")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| engine | ops | weights MB | engine MB | build s | whole command s | peak MB | peak / weights |")
    print("|---|---|---|---|---|---|---|---|")
    for name, bundle, options in bundles(args.work, args.shape):
        weights = json.loads((bundle / "gsx.json").read_text())["weights"]["size_bytes"]
        started = time.perf_counter()
        entry = json.loads(command("build", str(bundle), "--json", *options))
        seconds = time.perf_counter() - started
        made = entry["graphs"]["model"]
        print(
            f"| {name} | {', '.join(sorted(set(made['forms'].values()))) or 'none'} | {weights / 1e6:.1f} "
            f"| {made['size_bytes'] / 1e6:.1f} | {made['build_seconds']:.1f} | {seconds:.1f} "
            f"| {made['peak_bytes'] / 1e6:.0f} | {made['peak_bytes'] / weights:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
