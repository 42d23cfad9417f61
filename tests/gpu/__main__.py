"""Build, check and time the kernels in one call; the output is one table.

    python -m tests.gpu                 all of it; exit code 1 where a check fails or a figure is missed
    python -m tests.gpu --emulated      the checks alone, on the CPU, with the emulated kernels

Needs a GPU, nvcc, CMake and PyTorch; compute-sanitizer where it is there. Nothing of TensorRT.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from plugins.build import build
from plugins.cuda import Kernels
from plugins.errors import PluginError
from tests.gpu.checks import check_graph, run_checks
from tests.gpu.rows import Row, goal_row, table
from tests.gpu.timing import measure
from tests.plugins.kernel_cases import GuardedKernels

# Tools of compute-sanitizer, and what each finds. (initcheck would report the map of the scatter-add, which is read
# before it is written and not believed: plugins/gated_scatter_add/kernel.cu.)
SANITIZERS = {
    "memcheck": "accesses outside of memory",
    "racecheck": "races in shared memory",
    "synccheck": "wrong barriers",
}
_SANITIZER_SECONDS = 150
_SANITIZER_FAILED = 99


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.emulated:
        from tests.plugins.emulation import emulated_library

        rows = run_checks(GuardedKernels(emulated_library()), "cpu", quick=options.quick)
        return _finish(rows)
    if not torch.cuda.is_available():
        print("tests.gpu: PyTorch sees no GPU here; --emulated runs the checks on the CPU", file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    try:
        built = build(architectures=(f"{major}{minor}",), kernels_only=True)
        kernels = GuardedKernels(built.path)
    except PluginError as error:
        print(error, file=sys.stderr)
        return 1
    rows = []
    if "checks" in options.parts:
        rows += run_checks(kernels, "cuda", quick=options.quick)
        rows.append(check_graph(kernels))
    if "sanitizer" in options.parts:
        rows += [_sanitize(tool, finds) for tool, finds in SANITIZERS.items()]
    if "timing" in options.parts:
        rows.append(Row("build for this GPU", f"{built.record.seconds:g} s, nvcc {built.record.nvcc}"))
        rows += measure(Kernels(built.path))
    return _finish(rows)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--emulated", action="store_true", help="the checks alone, on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("checks", "sanitizer", "timing"),
        default=("checks", "sanitizer", "timing"),
        help="what to do; all of it by default",
    )
    return parser.parse_args(arguments)


def _sanitize(tool: str, finds: str) -> Row:
    """The quick checks, run under one tool of compute-sanitizer."""
    what = f"compute-sanitizer {tool} ({finds})"
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return Row(what, "compute-sanitizer is not installed", "nothing found", "missing")
    command = [program, "--tool", tool, "--error-exitcode", str(_SANITIZER_FAILED)]
    command += [sys.executable, "-m", "tests.gpu", "--quick", "--parts", "checks"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SANITIZER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Row(what, f"no answer within {_SANITIZER_SECONDS} s", "nothing found", "fail")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "=========" in line]
    last = lines[-1].replace("=", "").strip() if lines else f"exit code {done.returncode}"
    return goal_row(what, last, "nothing found", done.returncode == 0)


def _finish(rows: list[Row]) -> int:
    print(table(rows))
    return int(any(row.verdict == "fail" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
