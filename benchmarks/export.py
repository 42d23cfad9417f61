"""Export time and memory of a Llama with 1.1 B parameters, against ONNX Runtime GenAI's builder.

    python -m benchmarks.export --work DIR

Each export is a process of its own, including Python's start and imports. Peak memory is the kernel's account of the
finished process (`ru_maxrss`, which counts pages of mapped files too).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.bundles import GSX, Workshop
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.model import SHAPES
from gsx.benchmarking.rounds import in_turn, ratios

OURS, THEIRS = "gsx export", "GenAI builder"


@dataclass(frozen=True)
class Run:
    """A finished process: seconds, peak memory in GiB, and GB in the directory that it wrote."""

    seconds: float
    peak_gib: float
    written_gb: float


def run(command: Sequence[str], output: Path) -> Run:
    """Run a command that writes a directory, which is emptied first."""
    shutil.rmtree(output, ignore_errors=True)
    started = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = perf_counter() - started
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(seconds, usage.ru_maxrss / 2**20, sum(path.stat().st_size for path in output.iterdir()) / 1e9)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    made = parser("export", __doc__, work="the model and exports (14 GB)", rounds=2, quick={"shape": "tiny"})
    made.add_argument("--shape", choices=SHAPES, default="1b", help="of the model (default: 1b)")
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    model = workshop.model()
    print_header(made, args, arguments)
    print(f"checkpoint: {(model / 'model.safetensors').stat().st_size / 2**30:.2f} GiB of float32\n")
    ours, theirs = workshop.directory / "export-gsx", workshop.directory / "export-genai"
    gsx = [*GSX, "export", str(model), "-o", str(ours)]
    genai = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(theirs)]
    genai += ["-p", "fp32", "-e", "cpu", "-c", str(workshop.directory / "cache")]
    commands = {THEIRS: (genai, theirs), OURS: (gsx, ours)}
    found = in_turn(commands, lambda name: run(*commands[name]), args.rounds)
    lines = Table("round", "export", "seconds", "peak GiB", "written GB")
    for number in range(args.rounds):
        for name, runs in found.items():
            one = runs[number]
            lines.row(number + 1, name, f"{one.seconds:.1f}", f"{one.peak_gib:.2f}", f"{one.written_gb:.2f}")
    seconds = {name: [one.seconds for one in runs] for name, runs in found.items()}
    print(f"\nseconds, gsx /GenAI: {ratios(seconds[OURS], seconds[THEIRS]):.2f}")


if __name__ == "__main__":
    main()
