"""Export time and memory of a 1.1 B-parameter Llama, against ONNX Runtime GenAI's builder.

    python -m benchmarks.export --work DIR        (needs 14 GB of disk)

Each export is a process of its own, Python's start and imports included; peak memory is the kernel's account of the
finished process (`ru_maxrss`, which counts pages of mapped files too).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def main() -> None:
    """Run both exports in turn and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / "model-1b"
    if not model.exists():
        subprocess.run(
            [sys.executable, "-c", f"from benchmarks.model import *; make_model(Path({str(model)!r}), '1b', None)"],
            check=True,
        )
    weights = (model / "model.safetensors").stat().st_size
    ours, theirs = args.work / "export-gsx", args.work / "export-genai"
    gsx = [str(Path(sys.executable).parent / "gsx"), "export", str(model), "-o", str(ours)]
    genai = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(theirs)]
    genai += ["-p", "fp32", "-e", "cpu", "-c", str(args.work / "cache")]
    print(f"checkpoint: {weights / 2**30:.2f} GiB of fp32\n")
    print("| round | export | seconds | peak GiB | written GB |")
    print("|---|---|---|---|---|")
    for number in range(args.rounds):
        for name, command, output in (("GenAI builder", genai, theirs), ("gsx export", gsx, ours)):
            shutil.rmtree(output, ignore_errors=True)
            seconds, peak = measured(command)
            written = sum(path.stat().st_size for path in output.iterdir()) / 1e9
            print(f"| {number + 1} | {name} | {seconds:.1f} | {peak:.2f} | {written:.2f} |", flush=True)


if __name__ == "__main__":
    main()
